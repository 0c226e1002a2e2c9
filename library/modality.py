"""The two modalities and how each becomes what the autoencoder reads: pixels in [-1, 1] with three channels.

Shape letters: B any leading axes, h w rows and columns.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

DepthTransform = Literal["none", "inverse"]
DEPTH_TRANSFORMS: tuple[str, ...] = ("none", "inverse")


@dataclass(frozen=True, kw_only=True, slots=True)
class Modality:
    """One row of `MODALITIES`.

    `index` is its place on the modality axis M. `folder` and `suffix` name its files in a prepared image folder and
    `latent_folder` its cached latents. `to_unit(values)` gives a file's values as results hold them, in [0, 1].
    `to_pixels(values, transform=...)` and `from_pixels(pixels, transform=...)` are the two directions of one rung;
    both take and return any leading axes.
    """

    name: str
    index: int
    folder: str
    suffix: str
    latent_folder: str
    to_unit: Callable[[Tensor], Tensor]
    to_pixels: Callable[..., Tensor]
    from_pixels: Callable[..., Tensor]


def normalize_disparity(disparity_Bhw: Tensor) -> Tensor:
    """Scale every map to [0, 1] by its own smallest and largest value; a constant map becomes all 0."""
    low = disparity_Bhw.amin(dim=(-2, -1), keepdim=True)
    span = disparity_Bhw.amax(dim=(-2, -1), keepdim=True) - low
    return (disparity_Bhw - low) / span.where(span > 0, 1)


def rgb_to_pixels(rgb_B3hw: Tensor, *, transform: str = "none") -> Tensor:
    """Map colours in [0, 1] to pixels in [-1, 1]; `transform` concerns depth only."""
    return rgb_B3hw * 2 - 1


def rgb_from_pixels(pixels_B3hw: Tensor, *, transform: str = "none") -> Tensor:
    """Map pixels to colours in [0, 1], clamped."""
    return (pixels_B3hw.clamp(-1, 1) + 1) / 2


def depth_to_pixels(disparity_Bhw: Tensor, *, transform: str = "none") -> Tensor:
    """Map disparity of any scale (near = large) to three equal channels (..., 3, h, w) in [-1, 1].

    Min-max normalised per map. `transform="inverse"` gives the model 1 - d instead (near = small).
    """
    unit_Bhw = _transformed(normalize_disparity(disparity_Bhw), transform)
    pixels_Bhw = unit_Bhw * 2 - 1
    return pixels_Bhw.unsqueeze(-3).expand(*pixels_Bhw.shape[:-2], 3, *pixels_Bhw.shape[-2:])


def depth_from_pixels(pixels_B3hw: Tensor, *, transform: str = "none") -> Tensor:
    """Map pixels to relative disparity (..., h, w) in [0, 1], near = large: clamp, mean of the channels, transform
    undone.

    The result isn't stretched to the full range again: that would undo what the model said of its own certainty.
    """
    return _transformed((pixels_B3hw.clamp(-1, 1).mean(dim=-3) + 1) / 2, transform)


def _transformed(unit_Bhw: Tensor, transform: str) -> Tensor:
    """Apply a depth transform to values in [0, 1]; each is its own inverse."""
    if transform not in DEPTH_TRANSFORMS:
        raise ValueError(f"depth transform {transform!r} is none of {', '.join(DEPTH_TRANSFORMS)}")
    return 1 - unit_Bhw if transform == "inverse" else unit_Bhw


MODALITIES: dict[str, Modality] = {
    modality.name: modality
    for modality in (
        Modality(
            name="rgb",
            index=0,
            folder="processed_images",
            suffix=".png",
            latent_folder="image_latents",
            to_unit=lambda rgb_B3hw: rgb_B3hw,
            to_pixels=rgb_to_pixels,
            from_pixels=rgb_from_pixels,
        ),
        Modality(
            name="depth",
            index=1,
            folder="depthmaps",
            suffix=".npy",
            latent_folder="depth_latents",
            to_unit=normalize_disparity,
            to_pixels=depth_to_pixels,
            from_pixels=depth_from_pixels,
        ),
    )
}
