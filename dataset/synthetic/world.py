"""Scenes as tensors on a device, ready to be traced.

Legend: B frames, K object slots, M (frame, slot) pairs of one kind of solid.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dataset.synthetic.geometry import KINDS, Room, Solids
from dataset.synthetic.looks import PATTERNS, WALLS
from dataset.synthetic.palette import PALETTE
from dataset.synthetic.scene import SLOTS, Scene


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """A batch of scenes as tensors. `table` columns are (B, K), `frame` columns (B, 1)."""

    groups: list[Solids]
    room: Room
    table: dict[str, Tensor]
    frame: dict[str, Tensor]
    floors: dict[str, Tensor]


def _item_columns(scene: Scene) -> list[dict[str, float]]:
    rows = []
    for item in scene.items:
        albedo = PALETTE[item.colour]
        rows.append(
            {
                "cx": item.centre[0],
                "cy": item.centre[1],
                "cz": item.centre[2],
                "sx": item.half[0],
                "sy": item.half[1],
                "sz": item.half[2],
                "cos": math.cos(item.turn),
                "sin": math.sin(item.turn),
                "kind": KINDS.index(item.shape),
                "pattern": PATTERNS.index(item.pattern),
                "bands": item.bands / (2 * item.half[1]),
                "gloss": item.gloss,
                "round": 0.9 * min(item.half),
                "r": albedo[0],
                "g": albedo[1],
                "b": albedo[2],
            }
        )
    return rows


def _light_axes(scene: Scene) -> tuple[list[float], list[float]]:
    """Two vectors that span the disc of the key light, as seen from the objects."""
    x, y, z = scene.light.position
    flat = math.hypot(x, z)
    length = math.sqrt(x * x + y * y + z * z)
    r = scene.light.radius
    across = [r * z / flat, 0.0, -r * x / flat]
    upward = [-r * x * y / (flat * length), r * flat / length, -r * z * y / (flat * length)]
    return across, upward


def _frame_columns(scene: Scene) -> dict[str, float]:
    s, light, camera = scene.surroundings, scene.light, scene.camera
    right, up, forward = camera.axes()
    first, second = _light_axes(scene)
    vectors = {
        "right": right,
        "up": up,
        "forward": forward,
        "eye": camera.position,
        "light": light.position,
        "disc1": first,
        "disc2": second,
        "key": light.colour,
        "sky": light.sky,
        "zenith": light.zenith,
        "horizon": light.horizon,
        "floor1": s.floor_colours[0],
        "floor2": s.floor_colours[1],
        "wall1": s.wall_colours[0],
        "wall2": s.wall_colours[1],
    }
    columns = {f"{name}{axis}": value for name, vector in vectors.items() for axis, value in enumerate(vector)}
    return columns | {
        "tan": camera.tan_half,
        "fades": float(light.fades),
        "reach": math.dist(light.position, camera.look_at),
        "open": float(s.kind == "open"),
        "cos": math.cos(s.turn),
        "sin": math.sin(s.turn),
        "x0": s.extent[0],
        "x1": s.extent[1],
        "z0": s.extent[2],
        "z1": s.extent[3],
        "height": s.height,
        "floor_cos": math.cos(s.floor_turn) / s.floor_scale,
        "floor_sin": math.sin(s.floor_turn) / s.floor_scale,
        "wall": float(WALLS.index(s.wall)),
        "wall_scale": s.wall_scale,
        "glow": float(light.kind == "evening"),
    }


def build_world(scenes: list[Scene], device: torch.device) -> World:
    """Scenes as tensors on a device; the values are rounded to float32 here, once."""
    rows = [_item_columns(scene) for scene in scenes]
    frames = [_frame_columns(scene) for scene in scenes]
    stacked = torch.tensor([list(f.values()) for f in frames], dtype=torch.float32, device=device)
    frame = {name: stacked[:, i : i + 1] for i, name in enumerate(frames[0])}
    names = list(rows[0][0])
    blank = dict.fromkeys(names, 0.0) | {"sx": 1.0, "sy": 1.0, "sz": 1.0, "cos": 1.0}
    padded = [[list(r.values()) for r in row + [blank] * (SLOTS - len(row))] for row in rows]
    cube = torch.tensor(padded, dtype=torch.float32, device=device)
    table = {name: cube[:, :, i] for i, name in enumerate(names)}
    groups = []
    for number, kind in enumerate(KINDS):
        pairs = [(b, k) for b, row in enumerate(rows) for k, r in enumerate(row) if r["kind"] == number]
        if pairs:
            frame_M, slot_M = (torch.tensor(column, device=device) for column in zip(*pairs, strict=True))
            shape = {n: table[n][frame_M, slot_M][:, None] for n in ("cx", "cy", "cz", "sx", "sy", "sz", "cos", "sin")}
            groups.append(Solids(kind=kind, frame_M=frame_M, slot_M=slot_M, **shape))
    room = Room(**{name: frame[name] for name in Room.__slots__})
    kinds = [scene.surroundings.floor for scene in scenes]
    frames_of = {kind: [b for b, k in enumerate(kinds) if k == kind] for kind in dict.fromkeys(kinds)}
    floors = {kind: torch.tensor(places, device=device) for kind, places in frames_of.items()}
    return World(groups=groups, room=room, table=table, frame=frame, floors=floors)
