"""The held-out scenes on which the embedded model is measured, as plain tensors: whoever renders them hands them in.

Shapes: N scenes, h w pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class SeenObject:
    """One object of a scene that can be seen: its palette colour, where it is, and whether the caption names its colour."""

    color: str
    mask_hw: Tensor
    named: bool

    @property
    def pixels(self) -> int:
        """Number of visible pixels."""
        return int(self.mask_hw.sum())


@dataclass(frozen=True, kw_only=True, slots=True)
class SceneSet:
    """Rendered scenes with their ground truth.

    Attributes:
        rgb_N3hw: pictures in [0, 1].
        disparity_Nhw: what the model is to predict: disparity scaled to [0, 1] for each picture, sky 0.
        metric_Nhw: depth along the camera's axis in metres, sky inf.
        captions: the prompt of each scene.
        objects: the visible objects of each scene.
        mean_map_hw: mean of the training scenes' `disparity`, for each pixel.
        version: the version of the generator that rendered them.
    """

    rgb_N3hw: Tensor
    disparity_Nhw: Tensor
    metric_Nhw: Tensor
    captions: Sequence[str]
    objects: Sequence[Sequence[SeenObject]]
    mean_map_hw: Tensor
    version: str
    seeds: Sequence[int] = field(default=())

    def __post_init__(self) -> None:
        counts = {len(self.rgb_N3hw), len(self.disparity_Nhw), len(self.metric_Nhw), len(self.captions), len(self.objects)}
        if len(counts) != 1:
            raise ValueError(f"a scene set needs as many of each part, found {sorted(counts)}")

    def __len__(self) -> int:
        return len(self.captions)

    def named_colors(self) -> list[set[str]]:
        """Return for each scene the colours of the objects that its caption names (floors and walls left out)."""
        return [{item.color for item in seen if item.named} for seen in self.objects]


def unit_disparity(disparity_Nhw: Tensor) -> Tensor:
    """Scale disparity 1/Z to [0, 1] by each picture's own least and largest value, as training does; a flat map gives 0."""
    low_N11 = disparity_Nhw.amin((1, 2), keepdim=True)
    high_N11 = disparity_Nhw.amax((1, 2), keepdim=True)
    return (disparity_Nhw - low_N11) / (high_N11 - low_N11).clamp_min(torch.finfo(disparity_Nhw.dtype).tiny)
