"""Sizes: what the model can take (multiples of 16 pixels) and the way back to the picture's own size.

Shape letters: B any leading axes, C channels, h w rows and columns.
"""

from torch import Tensor
from torch.nn import functional

from library.flux.latents import PIXELS_PER_TOKEN


def pad_to_multiple(x_BChw: Tensor, multiple: int = PIXELS_PER_TOKEN) -> Tensor:
    """Pad on the right and below, repeating the edge, until both sides are multiples of `multiple`."""
    height, width = x_BChw.shape[-2:]
    right, below = -width % multiple, -height % multiple
    if not (right or below):
        return x_BChw
    flat = x_BChw.reshape(-1, 1, height, width)
    return functional.pad(flat, (0, right, 0, below), mode="replicate").view(
        *x_BChw.shape[:-2], height + below, width + right
    )


def crop(x_BChw: Tensor, *, height: int, width: int) -> Tensor:
    """Undo `pad_to_multiple`: keep the first `height` rows and `width` columns."""
    return x_BChw[..., :height, :width]


def resize(x_BChw: Tensor, *, height: int, width: int) -> Tensor:
    """Resize the last two axes bilinearly, smoothing when it shrinks; no map's range of values is ever left."""
    if x_BChw.shape[-2:] == (height, width):
        return x_BChw
    flat = x_BChw.reshape(-1, 1, *x_BChw.shape[-2:])
    resized = functional.interpolate(flat, size=(height, width), mode="bilinear", antialias=True, align_corners=False)
    # The weights of a mean add up to 1 only roughly, so that the mean of equal values can lie a last bit beside them.
    resized = resized.clamp(flat.amin(dim=(-2, -1), keepdim=True), flat.amax(dim=(-2, -1), keepdim=True))
    return resized.view(*x_BChw.shape[:-2], height, width)


MAX_TOKENS = 65536  # of one modality, 4096 x 4096 pixels: more is a slip of the flags, or no memory will do
MAX_ASPECT = 8  # long side to short side: with its short side as the model wants it, a thinner picture is a huge one

UNSEEN_STRETCH = 1.02  # sides of whole pixels, or of multiples of 16, can rarely keep an aspect better


def is_too_thin(height: int, width: int) -> bool:
    """Whether a picture is too thin to be scaled by its short side."""
    return max(height, width) > MAX_ASPECT * min(height, width)


def is_stretched(size: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether a picture of one (height, width) visibly changes its aspect in the other; rounding doesn't count."""
    change = size[0] * other[1] / (size[1] * other[0])
    return max(change, 1 / change) > UNSEEN_STRETCH


def processing_size(height: int, width: int, *, short_side: int) -> tuple[int, int]:
    """Return (height, width) in the same aspect with the short side at `short_side`; 0 keeps the size."""
    if short_side == 0:
        return height, width
    scale = short_side / min(height, width)
    return max(1, round(height * scale)), max(1, round(width * scale))
