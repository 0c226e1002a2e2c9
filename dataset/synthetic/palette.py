"""Twelve named object colours, and the test that names a rendered object's colour.

Colours are albedos in linear light. Pictures are encoded with a gamma of exactly 2, so that display = sqrt(linear).
"""

from torch import Tensor

from library.evaluation.colors import oklab

PALETTE: dict[str, tuple[float, float, float]] = {
    "red": (0.72, 0.030, 0.035),
    "orange": (0.94, 0.290, 0.015),
    "yellow": (0.95, 0.760, 0.050),
    "green": (0.060, 0.430, 0.085),
    "turquoise": (0.060, 0.640, 0.600),
    "blue": (0.035, 0.130, 0.720),
    "purple": (0.270, 0.060, 0.520),
    "pink": (0.94, 0.340, 0.520),
    "brown": (0.200, 0.080, 0.030),
    "white": (0.90, 0.900, 0.880),
    "grey": (0.200, 0.205, 0.215),
    "black": (0.016, 0.016, 0.018),
}
"""Name -> linear albedo in [0, 1]."""

COLOURS = tuple(PALETTE)

# How brightly a surface may be lit, from shade to full light: each colour is compared as it looks at each of these.
_LIGHT_LEVELS = (0.55, 0.75, 0.95, 1.2)
_LIGHTNESS_WEIGHT = 0.6  # below 1: shading moves lightness far more than hue


def nearest_colour(rgb_3hw: Tensor, mask: Tensor) -> str:
    """Name the palette colour of the object under `mask`.

    The median of the mask's brighter half (shade and outlines fall into the darker half) is compared, in Oklab with
    lightness counted less, to every palette colour as it looks from shade to full light.

    Args:
        rgb_3hw: picture in [0, 1], gamma 2.
        mask: (h, w) bool, at least one pixel set.
    """
    pixels_N3 = rgb_3hw[:, mask].T.float().clamp(0, 1).square()
    if not len(pixels_N3):
        raise ValueError("nearest_colour needs at least one pixel in the mask")
    order = pixels_N3.sum(-1).argsort(descending=True)
    seen_3 = pixels_N3[order[: max(1, len(order) // 2)]].median(0).values
    levels_G = pixels_N3.new_tensor(_LIGHT_LEVELS)
    albedo_P3 = pixels_N3.new_tensor(list(PALETTE.values()))
    looks_PG3 = (albedo_P3[:, None] * levels_G[:, None]).clamp(0, 1)
    difference_PG3 = oklab(looks_PG3.reshape(-1, 3)).reshape(looks_PG3.shape) - oklab(seen_3[None])[0]
    weights_3 = pixels_N3.new_tensor([_LIGHTNESS_WEIGHT, 1.0, 1.0])
    distance_P = (difference_PG3 * weights_3).square().sum(-1).amin(-1)
    return COLOURS[int(distance_P.argmin())]
