"""Metrics: depth against metric ground truth (a table), and pictures against pictures.

Shapes: B batch, C channels, h w pixels; n the valid pixels of one image.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from library.evaluation.alignment import ALIGNMENTS, DepthRange


def _ratio(pred_n: Tensor, true_n: Tensor) -> Tensor:
    return torch.maximum(pred_n / true_n, true_n / pred_n)


def _delta(power: int) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda pred_n, true_n: (_ratio(pred_n, true_n) < 1.25**power).double().mean()


def _silog(pred_n: Tensor, true_n: Tensor) -> Tensor:
    log_n = pred_n.log() - true_n.log()
    return 100 * (log_n.square().mean() - log_n.mean().square()).clamp_min(0).sqrt()


# Each takes predicted and true depths in metres, both > 0 and float64, and returns one number for the image.
DEPTH_METRICS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "absrel": lambda pred_n, true_n: ((pred_n - true_n).abs() / true_n).mean(),
    "delta1": _delta(1),
    "delta2": _delta(2),
    "delta3": _delta(3),
    "rmse": lambda pred_n, true_n: (pred_n - true_n).square().mean().sqrt(),
    "log_rmse": lambda pred_n, true_n: (pred_n.log() - true_n.log()).square().mean().sqrt(),
    "log10": lambda pred_n, true_n: (pred_n.log10() - true_n.log10()).abs().mean(),
    "silog": _silog,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class DepthProtocol:
    """How predictions are compared with metric depth: a named alignment and the range that counts."""

    alignment: str
    depth_range: DepthRange

    def score(self, pred_hw: Tensor, depth_hw: Tensor) -> dict[str, float]:
        """Return the metrics of one image: relative prediction against depth in metres (inf or 0 where there is none).

        An image without a valid pixel has none. The fit is free to have a negative scale, as is usual, so that a map
        with near and far exchanged scores as well as the right one.
        """
        valid_hw = self.depth_range.valid(depth_hw)
        if not valid_hw.any():
            return {}
        aligned_hw = ALIGNMENTS[self.alignment](pred_hw, depth_hw, valid_hw=valid_hw, depth_range=self.depth_range)
        pred_n, true_n = aligned_hw[valid_hw].double(), depth_hw[valid_hw].double()
        return {name: float(metric(pred_n, true_n)) for name, metric in DEPTH_METRICS.items()}


def mean_scores(scores: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return the mean of each metric over the images that have it (NaN where none has).

    A prediction that isn't a number makes the mean NaN: it must not count as an image without ground truth.
    """
    found = [score for score in scores if score]
    return {name: sum(score[name] for score in found) / len(found) if found else math.nan for name in DEPTH_METRICS}


def psnr(pred_BChw: Tensor, true_BChw: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio in dB of each image, values in [0, 1]; at most 120 dB; shape (B,)."""
    error_B = (pred_BChw.double() - true_BChw.double()).square().flatten(1).mean(1)
    return -10 * error_B.clamp_min(1e-12).log10()


def shuffled(values: Tensor) -> Tensor:
    """Return the samples shifted by one, so that sample i meets sample i + 1: the pairing of the chance baselines."""
    return values.roll(-1, 0)
