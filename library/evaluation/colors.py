"""Which palette colours of objects can be found in a picture of which nothing else is known.

A generated picture has no object masks, so regions take their place:

1. every pixel gets the name of the nearest palette colour as it looks from deep shade to full light (Oklab, lightness
   counted less), or none when no look is near;
2. pixels of a colour that occurs on the picture's border are background (the camera frames the objects, so that
   floor, walls and sky fill the border), and so is what is thinner than 3 pixels;
3. connected regions of one name that are large and compact enough and don't run along the border are taken for
   objects;
4. the palette's own test, the one of `ae_hue_kept`, must give the region the same name.

The numbers below were chosen on true renders of training scenes alone: 0.98 of the named colours are found, and of the
next scene's colours 0.32, where 0.31 truly are there too. What is left of false finds is white and grey, which floors
and shadows wear as well.

Shapes: B batch, P palette colours, G light levels, h w pixels, R regions.
"""

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from library.evaluation.regions import Regions, describe_regions, opened

LIGHTNESS_WEIGHT = 0.6  # shading moves lightness far more than hue
LIGHT_LEVELS = (0.22, 0.3, 0.4, 0.55, 0.75, 0.95, 1.2)  # from deep shade to full light
MAX_DISTANCE = 0.05  # in weighted Oklab; object pixels lie within 0.03, most coloured floors beyond 0.05
BACKGROUND_DISTANCE = 0.025  # Oklab with hue counted twice, to the nearest colour of the border
BORDER_STEP = 3  # every third border pixel is enough, since floors and walls are smooth
MIN_AREA = 60  # pixels at 128 x 128, in proportion at other sizes
MIN_FILL = 0.3  # of the bounding box
MAX_BORDER = 0.2  # border pixels over the square root of the area
_CUBE = 64  # levels a channel at which distances are tabulated


@dataclass(frozen=True, kw_only=True, slots=True)
class Palette:
    """Named object colours and the test that names what a mask covers.

    Attributes:
        albedo: colours in linear light; pictures show their square root (gamma 2).
        nearest: names the palette colour of a picture (3, h, w) in [0, 1] under a mask (h, w).
    """

    albedo: Mapping[str, tuple[float, float, float]]
    nearest: Callable[[Tensor, Tensor], str]

    @property
    def names(self) -> tuple[str, ...]:
        """Names in the palette's order."""
        return tuple(self.albedo)


def oklab(linear: Tensor) -> Tensor:
    """Return Oklab (Ottosson, 2020) of colours in linear light from 0, sRGB's primaries, colour in the last axis."""
    to_lms = linear.new_tensor(
        [
            [0.4122214708, 0.5363325363, 0.0514459929],
            [0.2119034982, 0.6806995451, 0.1073969566],
            [0.0883024619, 0.2817188376, 0.6299787005],
        ]
    )
    to_lab = linear.new_tensor(
        [
            [0.2104542553, 0.7936177850, -0.0040720468],
            [1.9779984951, -2.4285922050, 0.4505937099],
            [0.0259040371, 0.7827717662, -0.8086757660],
        ]
    )
    return (linear @ to_lms.T).clamp_min(0).pow(1 / 3) @ to_lab.T


class ColorFinder:
    """Finds the palette's colours in pictures; distances are tabulated once, when it is made."""

    def __init__(self, palette: Palette) -> None:
        self.palette = palette
        levels = (torch.arange(_CUBE) + 0.5) / _CUBE
        seen = oklab(torch.cartesian_prod(levels, levels, levels).square())
        weight_3 = torch.tensor([LIGHTNESS_WEIGHT, 1.0, 1.0])
        distances = []
        for albedo in palette.albedo.values():
            looks_G3 = torch.tensor(albedo) * torch.tensor(LIGHT_LEVELS)[:, None]
            distances.append(torch.cdist(seen * weight_3, oklab(looks_G3.clamp(0, 1)) * weight_3).amin(1))
        nearest, self._label = torch.stack(distances).min(0)
        self._label[nearest > MAX_DISTANCE] = -1

    def label(self, rgb_B3hw: Tensor) -> Tensor:
        """Return the palette index of every pixel, -1 for background and for what has no palette colour; (B, h, w)."""
        cell_B3hw = (rgb_B3hw.clamp(0, 1) * _CUBE).long().clamp_max(_CUBE - 1)
        label_Bhw = self._label[(cell_B3hw[:, 0] * _CUBE + cell_B3hw[:, 1]) * _CUBE + cell_B3hw[:, 2]]
        label_Bhw[_like_border(rgb_B3hw)] = -1
        thick_Bhw = torch.zeros_like(label_Bhw, dtype=torch.bool)
        for index in range(len(self.palette.albedo)):
            thick_Bhw |= opened(label_Bhw == index, radius=1)
        return label_Bhw.where(thick_Bhw, -1)

    def find(self, rgb_B3hw: Tensor) -> list[set[str]]:
        """Return for each picture in [0, 1] the colours of what looks like objects."""
        rgb_B3hw = rgb_B3hw.float().cpu()
        regions = describe_regions(self.label(rgb_B3hw))
        found: list[set[str]] = [set() for _ in rgb_B3hw]
        for region in _object_like(regions, pixels=rgb_B3hw[0, 0].numel()).nonzero().flatten().tolist():
            image, name = int(regions.image_R[region]), self.palette.names[int(regions.label_R[region])]
            mask_hw = regions.index_Bhw[image] == region
            if name not in found[image] and self.palette.nearest(rgb_B3hw[image], mask_hw) == name:
                found[image].add(name)
        return found


def _like_border(rgb_B3hw: Tensor) -> Tensor:
    """Return where a pixel has about the colour of some pixel of its picture's border, bool (B, h, w)."""
    weight_3 = rgb_B3hw.new_tensor([1.0, 2.0, 2.0])  # hue tells things apart better than lightness
    lab_Bhw3 = oklab(rgb_B3hw.clamp(0, 1).square().movedim(1, -1)) * weight_3
    near = []
    for lab_hw3 in lab_Bhw3:
        sides = (lab_hw3[0], lab_hw3[-1], lab_hw3[:, 0], lab_hw3[:, -1])
        border = torch.cat([side[::BORDER_STEP] for side in sides])
        distance = torch.cdist(lab_hw3.flatten(0, 1), border).amin(1)
        near.append(distance.view(lab_hw3.shape[:2]) < BACKGROUND_DISTANCE)
    return torch.stack(near)


def _object_like(regions: Regions, *, pixels: int) -> Tensor:
    """Return which regions are large, compact and free enough of the border to be objects, bool (R,)."""
    return (
        (regions.label_R >= 0)
        & (regions.area_R >= MIN_AREA * pixels / 128**2)
        & (regions.area_R >= MIN_FILL * regions.box_R)
        & (regions.border_R <= MAX_BORDER * regions.area_R.sqrt())
    )


def found_share(found: Sequence[Set[Any]], wanted: Sequence[Set[Any]]) -> float:
    """Return the share of all wanted words, over all pictures together, that were found in their picture."""
    total = sum(len(words) for words in wanted)
    hits = sum(len(have & want) for have, want in zip(found, wanted, strict=True))
    return hits / total if total else float("nan")
