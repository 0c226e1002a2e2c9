"""Alignments of a relative prediction to metric depth, by name; the name is printed with every result.

A network that predicts depth up to scale and shift is first fitted to the ground truth of each image by least squares.
What is fitted (depth or disparity) and how the result is clipped changes the figures a great deal, so each way is one
named row of `ALIGNMENTS`.

Shapes: h w pixels; n the pixels of one image that take part.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

MIN_DISPARITY = 1e-3  # 1/m; what every disparity alignment clips to before inverting


@dataclass(frozen=True, kw_only=True, slots=True)
class DepthRange:
    """The depths in metres that count; ground truth outside is invalid, and predictions are clipped to it."""

    low: float
    high: float

    def __post_init__(self) -> None:
        if not 0 < self.low < self.high:
            raise ValueError(f"a depth range needs 0 < low < high, found {self.low} .. {self.high}")

    def valid(self, depth_hw: Tensor) -> Tensor:
        """Return where the depth in metres is finite and inside the range (bool, same shape)."""
        return torch.isfinite(depth_hw) & (depth_hw >= self.low) & (depth_hw <= self.high)


def fit_affine(x_n: Tensor, y_n: Tensor) -> tuple[float, float]:
    """Return the (scale, shift) of the least-squares fit `scale * x + shift = y`, computed in float64.

    A constant `x` gives scale 0 and the mean of `y`; no pixels at all give (0, 0).
    """
    if x_n.numel() == 0:
        return 0.0, 0.0
    x_n, y_n = x_n.double(), y_n.double()
    x_mean, y_mean = x_n.mean(), y_n.mean()
    x_n, y_n = x_n - x_mean, y_n - y_mean
    variance = x_n.square().mean()
    scale = (x_n * y_n).mean() / variance if variance > 1e-12 * (1 + x_mean.square()) else torch.zeros_like(variance)
    return float(scale), float(y_mean - scale * x_mean)


def affine_depth(pred_hw: Tensor, depth_hw: Tensor, *, valid_hw: Tensor, depth_range: DepthRange) -> Tensor:
    """Fit a predicted relative depth to the depth in metres over the valid pixels; returns metres, clipped to range."""
    scale, shift = fit_affine(pred_hw[valid_hw], depth_hw[valid_hw])
    return (scale * pred_hw.double() + shift).clamp(depth_range.low, depth_range.high)


def _fitted_disparity(pred_hw: Tensor, depth_hw: Tensor, valid_hw: Tensor) -> Tensor:
    """Return the predicted disparity fitted to 1/depth over pixels that are valid with depth > 0 and prediction > 0."""
    use_hw = valid_hw & (depth_hw > 0) & (pred_hw > 0)
    scale, shift = fit_affine(pred_hw[use_hw], 1 / depth_hw[use_hw].double())
    return scale * pred_hw.double() + shift


def affine_disparity(pred_hw: Tensor, depth_hw: Tensor, *, valid_hw: Tensor, depth_range: DepthRange) -> Tensor:
    """Fit a predicted disparity to 1/depth; then disparity >= 1e-3, invert, clip to the range; returns metres."""
    disparity_hw = _fitted_disparity(pred_hw, depth_hw, valid_hw).clamp_min(MIN_DISPARITY)
    return (1 / disparity_hw).clamp(depth_range.low, depth_range.high)


def affine_disparity_capped(pred_hw: Tensor, depth_hw: Tensor, *, valid_hw: Tensor, depth_range: DepthRange) -> Tensor:
    """As `affine_disparity`, but with disparity >= 1 / (largest valid depth): MoGe's way; returns metres."""
    far = float(depth_hw[valid_hw].max()) if valid_hw.any() else depth_range.high
    disparity_hw = _fitted_disparity(pred_hw, depth_hw, valid_hw).clamp_min(1 / far)
    return (1 / disparity_hw).clamp(depth_range.low, depth_range.high)


ALIGNMENTS: dict[str, Callable[..., Tensor]] = {
    function.__name__: function for function in (affine_depth, affine_disparity, affine_disparity_capped)
}
