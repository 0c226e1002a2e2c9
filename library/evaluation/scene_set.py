"""The held-out scenes on which the embedded model is measured, as plain tensors: whoever renders them hands them in.

Shapes: N scenes, h w pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class SeenObject:
    """One object of a scene that can be seen: its colour, its solid, where it is, whether the caption names it."""

    color: str
    shape: str
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
    """

    rgb_N3hw: Tensor
    disparity_Nhw: Tensor
    metric_Nhw: Tensor
    captions: Sequence[str]
    objects: Sequence[Sequence[SeenObject]]
    mean_map_hw: Tensor

    def __post_init__(self) -> None:
        parts = (self.rgb_N3hw, self.disparity_Nhw, self.metric_Nhw, self.captions, self.objects)
        counts = {len(part) for part in parts}
        if len(counts) != 1:
            raise ValueError(f"a scene set needs as many of each part, found {sorted(counts)}")

    def __len__(self) -> int:
        return len(self.captions)

    def named_colors(self) -> list[set[str]]:
        """Return for each scene the colours of the objects that its caption names (floors and walls left out)."""
        return [{item.color for item in seen if item.named} for seen in self.objects]

    def seen_colors(self) -> list[set[str]]:
        """Return for each scene the colours of all its visible objects, named or not."""
        return [{item.color for item in seen} for seen in self.objects]

    def named_shapes(self) -> list[set[tuple[str, str]]]:
        """Return for each scene the (colour, solid) pairs that its caption names."""
        return [{(item.color, item.shape) for item in seen if item.named} for seen in self.objects]

    def seen_shapes(self) -> list[set[tuple[str, str]]]:
        """Return for each scene the (colour, solid) pairs of all its visible objects, named or not."""
        return [{(item.color, item.shape) for item in seen} for seen in self.objects]
