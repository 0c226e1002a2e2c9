"""From (seed, index) to pictures, exact depth, object maps, captions and records.

Legend: B frames, N rays of a frame, h w pixels, S samples of a pixel.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dataset.synthetic.captions import describe
from dataset.synthetic.geometry import Rays
from dataset.synthetic.scene import Scene, sample_scene
from dataset.synthetic.shading import shade, trace
from dataset.synthetic.world import World, build_world

GENERATOR_VERSION = 1
"""Raised whenever a picture, depth map or caption of any (seed, index) changes."""
HELD_OUT_SEED = 1000001
"""Scenes of this seed are for evaluation; no training set may use it."""

_EDGE = 0.06  # difference between neighbours (display values) above which a pixel is sampled four times
_CHUNK = 1  # frames at a time on a CPU: more leave the cache


@dataclass(frozen=True, kw_only=True, slots=True)
class SceneBatch:
    """Rendered scenes.

    Attributes:
        rgb_B3hw: float32 in [0, 1], gamma 2.
        metric_Bhw: float32 metres along the camera's axis at pixel centres, within 0.1 .. 20; sky inf.
        disparity_Bhw: float32 1 / metres; sky 0.
        ids_Bhw: int64 place of the visible object in its record's list, -1 for background.
        captions: one sentence each, true of the picture.
        records: one JSON-ready dictionary each: camera, light, surroundings, objects.
    """

    rgb_B3hw: Tensor
    metric_Bhw: Tensor
    disparity_Bhw: Tensor
    ids_Bhw: Tensor
    captions: list[str]
    records: list[dict]


def camera_rays(world: World, x_BN: Tensor, y_BN: Tensor, *, size: int) -> Rays:
    """Rays through picture points (pixels from the top left corner); t is depth along the camera's axis."""
    f = world.frame
    across = (x_BN * (2 / size) - 1) * f["tan"]
    upward = (1 - y_BN * (2 / size)) * f["tan"]
    d = [f[f"forward{c}"] + across * f[f"right{c}"] + upward * f[f"up{c}"] for c in range(3)]
    return Rays(ox=f["eye0"], oy=f["eye1"], oz=f["eye2"], dx=d[0], dy=d[1], dz=d[2])


def _edges(display_B3hw: Tensor, ids_Bhw: Tensor) -> Tensor:
    """Pixels beside a jump of colour or of object, bool (B, h, w)."""
    edge = torch.zeros_like(ids_Bhw, dtype=torch.bool)
    for axis in (-1, -2):
        jump = display_B3hw.diff(dim=axis).abs().amax(1) > _EDGE
        jump = jump | (ids_Bhw.diff(dim=axis) != 0)
        length = edge.shape[axis] - 1
        edge.narrow(axis, 0, length).logical_or_(jump)
        edge.narrow(axis, 1, length).logical_or_(jump)
    return edge


def _smooth_edges(world: World, linear_B3N: Tensor, edge_BN: Tensor, *, size: int) -> Tensor:
    """Replace edge pixels by the mean of four samples.

    The two diagonals share the light's points between them. Frames with fewer edges fill up with other pixels, which
    stay as they are.
    """
    count = int(edge_BN.sum(1).max())
    if count == 0:
        return linear_B3N
    order_BN = edge_BN.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :count]
    real_BN = edge_BN.gather(1, order_BN)
    x_BN = (order_BN % size).float() + 0.5
    y_BN = (order_BN // size).float() + 0.5
    sums = []
    for slope, samples in ((0.25, slice(0, None, 2)), (-0.25, slice(1, None, 2))):
        rays = camera_rays(
            world,
            torch.cat([x_BN - 0.25, x_BN + 0.25], 1),
            torch.cat([y_BN - slope, y_BN + slope], 1),
            size=size,
        )
        first, second = shade(world, rays, trace(world, rays), size=size, samples=samples).chunk(2, -1)
        sums.append(first + second)
    index_B3N = order_BN[:, None].expand(-1, 3, -1)
    mean_B3N = torch.where(real_BN[:, None], (sums[0] + sums[1]) * 0.25, linear_B3N.gather(2, index_B3N))
    return linear_B3N.scatter(2, index_B3N, mean_B3N)


def _render(scenes: list[Scene], size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Picture, metric depth and object map of some scenes."""
    world = build_world(scenes, device)
    pixel_N = torch.arange(size * size, device=device)
    x_BN = ((pixel_N % size).float() + 0.5)[None].expand(len(scenes), -1)
    y_BN = ((pixel_N // size).float() + 0.5)[None].expand(len(scenes), -1)
    rays = camera_rays(world, x_BN, y_BN, size=size)
    hits = trace(world, rays)
    linear_B3N = shade(world, rays, hits, size=size)
    ids_Bhw = hits.slot.unflatten(1, (size, size))
    edge_Bhw = _edges(linear_B3N.sqrt().unflatten(2, (size, size)), ids_Bhw)
    linear_B3N = _smooth_edges(world, linear_B3N, edge_Bhw.flatten(1), size=size)
    return linear_B3N.sqrt().unflatten(2, (size, size)), hits.t.unflatten(1, (size, size)), ids_Bhw


@torch.no_grad()
def render_batch(seed: int, indices: Sequence[int], size: int = 128, device: torch.device | str = "cpu") -> SceneBatch:
    """Render the scenes (seed, index) for each index as square pictures of `size` pixels.

    A frame depends on nothing but seed, index and size: not on its batch, nor on the order.

    Raises:
        ValueError: no index, a negative index or seed, or a size below 16.
    """
    indices = [int(i) for i in indices]
    if not indices or min(indices) < 0 or seed < 0 or size < 16:
        raise ValueError(f"needs indices >= 0, seed >= 0 and size >= 16, not {indices[:4]}, {seed}, {size}")
    device = torch.device(device)
    scenes = [sample_scene(seed, index) for index in indices]
    chunk = _CHUNK if device.type == "cpu" else len(scenes)
    parts = [_render(scenes[i : i + chunk], size, device) for i in range(0, len(scenes), chunk)]
    rgb_B3hw, metric_Bhw, ids_Bhw = (torch.cat(column) for column in zip(*parts, strict=True))
    texts = [
        describe(scene, ids, metric, generator_version=GENERATOR_VERSION)
        for scene, ids, metric in zip(scenes, ids_Bhw.cpu(), metric_Bhw.cpu(), strict=True)
    ]
    return SceneBatch(
        rgb_B3hw=rgb_B3hw,
        metric_Bhw=metric_Bhw,
        disparity_Bhw=1 / metric_Bhw,
        ids_Bhw=ids_Bhw,
        captions=[record["caption"] for record in texts],
        records=texts,
    )
