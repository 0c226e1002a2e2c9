"""Which solids of which colour can be seen in a picture: two small networks trained on true scenes alone.

A generated picture has no record of what is in it, so classifiers look instead. `ColorCells` says for every cell of
4 x 4 pixels whether it shows an object, and of which palette colour; connected cells of one colour are taken for one
object; `SolidNet` says of the picture around each which solid it is. Together that is a pair such as ("red", "cone").

What they can see: the generator's solids in its palette and light, from about 50 visible pixels on, at 128 x 128 (other
sizes are resized). What they can't: how many of a kind there are (two red cones are one pair), sizes, places, patterns,
and whether a solid looks good. They never saw a generated picture, so where one resembles no scene at all their answer
means little; that is what shuffled prompts and the feature distance are beside it for.

They are made by `scripts/train_shape_finder.py` from scenes of a seed that neither training nor evaluation uses. Their
accuracy on held-out scenes is measured anew in every evaluation and stands beside `shape_words`.

Shapes: B batch, R regions, P palette colours, S solids, C channels, F features, h w pixels or cells.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors import safe_open
from torch import Tensor, nn

from library.errors import UserError
from library.evaluation.regions import describe_regions
from library.files import save_tensors

SIDE = 128  # pixels of the pictures the networks are trained on
CELL = 4  # pixels
VIEW = 32  # side of the view of one object that `SolidNet` gets
VIEW_MARGIN = 1.4  # the view's side over the longer side of the object
FEATURES = 48
_BATCH = 64

Pair = tuple[str, str]  # colour, solid


@dataclass(frozen=True, kw_only=True, slots=True)
class FinderSettings:
    """What a finder's file says of it.

    Attributes:
        solids: names of the solids.
        colors: names of the palette's colours.
        generator_version: of the scenes it was trained on.
        min_cells: connected cells that make an object.
    """

    solids: tuple[str, ...]
    colors: tuple[str, ...]
    generator_version: int
    min_cells: int


class _Layer(nn.Sequential):
    """3x3 convolution, batch norm, ReLU; with `residual`, added to what comes in."""

    def __init__(self, channels_in: int, channels: int, *, stride: int = 1, residual: bool = False) -> None:
        super().__init__(
            nn.Conv2d(channels_in, channels, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(channels)
        )
        self.residual = residual

    def forward(self, x_BChw: Tensor) -> Tensor:
        y_BChw = super().forward(x_BChw)
        return F.relu(y_BChw + x_BChw if self.residual else y_BChw)


class ColorCells(nn.Module):
    """A fully convolutional network: pictures to background or an object's colour, for each cell of 4 x 4 pixels."""

    def __init__(self, *, colors: int) -> None:
        super().__init__()
        self.fine = nn.Sequential(_Layer(12, 24), _Layer(24, 40, stride=2))  # at a half, at a quarter: the cells
        self.coarse = nn.Sequential(
            _Layer(40, FEATURES, stride=2), *(_Layer(FEATURES, FEATURES, residual=True) for _ in range(2))
        )
        self.join = nn.Conv2d(40 + FEATURES, 40, 1)
        self.head = nn.Conv2d(40, 1 + colors, 1)

    def trunk(self, rgb_B3hw: Tensor) -> tuple[Tensor, Tensor]:
        """Return inner values at the cells (B, C, h/4, w/4) and at half their resolution (B, F, h/8, w/8)."""
        fine_BChw = self.fine(F.pixel_unshuffle(rgb_B3hw - 0.5, 2))
        return fine_BChw, self.coarse(fine_BChw)

    def forward(self, rgb_B3hw: Tensor) -> Tensor:
        """Return logits of background and colours (B, 1 + P, h/4, w/4) for pictures in [0, 1]."""
        fine_BChw, coarse_BFhw = self.trunk(rgb_B3hw)
        wide_BFhw = F.interpolate(coarse_BFhw, size=fine_BChw.shape[-2:], mode="nearest")
        return self.head(F.relu(self.join(torch.cat([fine_BChw, wide_BFhw], 1))))


class SolidNet(nn.Sequential):
    """Views of objects (R, 4, 32, 32), as `views` gives them, to logits of the solids (R, S)."""

    def __init__(self, *, solids: int) -> None:
        super().__init__(
            _Layer(4, 16),
            _Layer(16, 32, stride=2),
            _Layer(32, 32, residual=True),
            _Layer(32, 48, stride=2),
            _Layer(48, 48, residual=True),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(4 * 48, solids),
        )

    def forward(self, view_R4hw: Tensor) -> Tensor:
        """Return logits for views."""
        return super().forward(self.even(view_R4hw))

    def inner(self, view_R4hw: Tensor) -> Tensor:
        """Return the last layer's values, averaged over each view, (R, F)."""
        x_RChw = self.even(view_R4hw)
        for layer in self:
            if not isinstance(layer, _Layer):
                break
            x_RChw = layer(x_RChw)
        return x_RChw.mean((2, 3))

    @staticmethod
    def even(view_R4hw: Tensor) -> Tensor:
        """Take the object's colour and light out of its view, for they don't say what solid it is."""
        rgb_R3hw, inside_R1hw = view_R4hw[:, :3], view_R4hw[:, 3:]
        count_R = inside_R1hw.sum((1, 2, 3), keepdim=True).clamp_min(1)
        mean_R3 = (rgb_R3hw * inside_R1hw).sum((2, 3), keepdim=True) / count_R
        variance_R = ((rgb_R3hw - mean_R3).square() * inside_R1hw).sum((1, 2, 3), keepdim=True) / (3 * count_R)
        even_R3hw = (rgb_R3hw - mean_R3) / (variance_R + 1e-3).sqrt() / 4
        return torch.cat([even_R3hw.clamp(-1.5, 1.5), inside_R1hw], 1)


class ShapeFinder(nn.Module):
    """Finds (colour, solid) pairs in pictures, and describes pictures by both networks' inner features."""

    def __init__(self, *, cells: ColorCells, solids: SolidNet, settings: FinderSettings) -> None:
        super().__init__()
        self.cells = cells
        self.solids = solids
        self.settings = settings
        self.eval()

    def find(self, rgb_B3hw: Tensor) -> list[set[Pair]]:
        """Return for each picture in [0, 1] the pairs that are seen in it."""
        found: list[set[Pair]] = [set() for _ in rgb_B3hw]
        start = 0
        for part_B3hw in _parts(rgb_B3hw):
            for image, color, solid in self._look(part_B3hw):
                found[start + image].add((self.settings.colors[color], self.settings.solids[solid]))
            start += len(part_B3hw)
        return found

    @torch.inference_mode()
    def _look(self, rgb_B3hw: Tensor) -> list[tuple[int, int, int]]:
        """Return (picture, colour, solid) of each object in some pictures."""
        label_Bhw = self.cells(rgb_B3hw).argmax(1)  # 0: background
        regions = describe_regions(label_Bhw)
        kept_R = ((regions.label_R > 0) & (regions.area_R >= self.settings.min_cells)).nonzero().flatten()
        if not len(kept_R):
            return []
        image_R = regions.image_R[kept_R]
        mask_Rhw = regions.index_Bhw[image_R] == kept_R[:, None, None]
        solid_R = self.solids(views(rgb_B3hw[image_R], mask_Rhw)).argmax(1)
        return list(zip(image_R.tolist(), (regions.label_R[kept_R] - 1).tolist(), solid_R.tolist(), strict=True))

    @torch.inference_mode()
    def features(self, rgb_B3hw: Tensor) -> Tensor:
        """Return each picture's inner features, averaged over the picture, (B, F) float64.

        Those of `ColorCells` know colours and places but hardly edges, those of `SolidNet` in the picture's 16 tiles
        edges but no colours; together they are 96.
        """
        features = []
        for part_B3hw in _parts(rgb_B3hw):
            tiles_R3hw = rearrange(part_B3hw, "b c (i h) (j w) -> (b i j) c h w", h=VIEW, w=VIEW)
            inner_RF = self.solids.inner(torch.cat([tiles_R3hw, torch.ones_like(tiles_R3hw[:, :1])], 1))
            edges_BF = inner_RF.unflatten(0, (len(part_B3hw), -1)).mean(1)
            features.append(torch.cat([self.cells.trunk(part_B3hw)[1].mean((2, 3)), edges_BF], 1))
        return torch.cat(features).double()


def views(rgb_R3hw: Tensor, mask_Rhw: Tensor, *, around: float = 1.0) -> Tensor:
    """Return a square view around each object, (R, 4, 32, 32): the picture in [0, 1], then 1 in the object's cells.

    Args:
        rgb_R3hw: each object's picture in [0, 1].
        mask_Rhw: its cells, at least one each.
        around: factor on what the view shows, and on its side in pixels.
    """
    height, width = mask_Rhw.shape[-2:]
    boxes = []
    for mask_hw in mask_Rhw:
        rows, columns = mask_hw.any(1).nonzero().flatten(), mask_hw.any(0).nonzero().flatten()
        top, bottom, left, right = int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1
        # In grid_sample's coordinates, -1 .. 1 over the picture.
        side = max((bottom - top) / height, (right - left) / width) * VIEW_MARGIN * around
        boxes.append(((left + right) / width - 1, (top + bottom) / height - 1, side))
    x_R, y_R, side_R = torch.tensor(boxes).unbind(1)
    zero_R = torch.zeros_like(x_R)
    theta_R23 = torch.stack([torch.stack([side_R, zero_R, x_R], 1), torch.stack([zero_R, side_R, y_R], 1)], 1)
    pixels = round(VIEW * around)
    grid = F.affine_grid(theta_R23, [len(theta_R23), 1, pixels, pixels], align_corners=False)
    seen_R3hw = F.grid_sample(rgb_R3hw, grid, padding_mode="border", align_corners=False)
    inside_R1hw = F.grid_sample(mask_Rhw[:, None].float(), grid, mode="nearest", align_corners=False)
    return torch.cat([seen_R3hw, inside_R1hw], 1)


def _parts(rgb_B3hw: Tensor) -> Iterator[Tensor]:
    for part_B3hw in rgb_B3hw.float().cpu().split(_BATCH):
        if part_B3hw.shape[-2:] != (SIDE, SIDE):
            part_B3hw = F.interpolate(
                part_B3hw, size=(SIDE, SIDE), mode="bilinear", antialias=True, align_corners=False
            )
        yield part_B3hw


def save_finder(path: Path, finder: ShapeFinder) -> None:
    """Write a finder as one safetensors file in half precision, its settings in the header."""
    state = finder.state_dict()
    halves = {name: tensor.half() for name, tensor in state.items() if tensor.is_floating_point()}  # no counters
    save_tensors(path, halves, asdict(finder.settings))


def load_finder(path: Path, *, solids: Sequence[str], colors: Sequence[str], generator_version: int) -> ShapeFinder:
    """Read a finder and check that it was trained on the scenes in use.

    Raises:
        UserError: if the file isn't there or was trained on other scenes.
    """
    remedy = "make it with python scripts/train_shape_finder.py"
    if not path.exists():
        raise UserError(f"the shape finder {path}: no such file; {remedy}")
    with safe_open(path, "pt") as file:
        stored = json.loads(file.metadata()["jointdit"])
        tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    settings = FinderSettings(**stored | {"solids": tuple(stored["solids"]), "colors": tuple(stored["colors"])})
    if (settings.solids, settings.colors, settings.generator_version) != (
        tuple(solids),
        tuple(colors),
        generator_version,
    ):
        raise UserError(
            f"the shape finder {path}: trained on scenes of generator version {settings.generator_version}, "
            f"not {generator_version}; {remedy}"
        )
    finder = ShapeFinder(cells=ColorCells(colors=len(colors)), solids=SolidNet(solids=len(solids)), settings=settings)
    state = finder.state_dict()
    counters = {name: tensor for name, tensor in state.items() if not tensor.is_floating_point()}
    finder.load_state_dict(tensors | counters)
    return finder
