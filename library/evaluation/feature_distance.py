"""How far generated pictures as a whole are from real ones: the Frechet distance of features, in units of real data.

The Frechet distance (Heusel et al., 2017) of a few hundred pictures is mostly bias: even two halves of real data are
far apart. The bias depends on the number of pictures, so both distances are taken between halves of the same size:
`ratio` is the distance of half of the generated pictures to half of the real ones, over the distance of the two halves
of the real ones. Pictures that can't be told from real ones have a ratio of about 1. The unbiased kernel distance
(Binkowski et al., 2018) would need no such care, but between two halves of real data it is 0 in the mean, and a ratio
to that says nothing. The ratio grows with the number of pictures, so that it compares only at equal numbers.

Features are first divided by their standard deviation over the real pictures, so that none outweighs the others.
Measured with 256 true scenes against 256 others: 0.9 to 1.1; blurred by a 3 x 3 box 2.4, a warp of about 2.5 pixels
1.5, eight pictures repeated 7.0.

Generated picture i comes from the caption of real picture i; the halves that are compared hold different scenes.

Shapes: N pictures, F features.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from library.randomness import generator_for

SPLITS = 8  # ways to halve, averaged


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureDistance:
    """Mean Frechet distances between halves: generated against real, and real against real."""

    generated: float
    real: float

    @property
    def ratio(self) -> float:
        """Generated over real: about 1 for pictures that can't be told from real ones."""
        return self.generated / self.real if self.real > 0 else float("nan")


def frechet(first_NF: Tensor, second_NF: Tensor) -> float:
    """Return the Frechet distance of the normal distributions that fit two sets of features, computed in float64.

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)); the trace of the root is the sum of the singular values of X1 X2^T for
    any X with C = X^T X, so that few samples (a covariance without full rank) need no special care.
    """
    first_NF, second_NF = first_NF.double(), second_NF.double()
    means = [features.mean(0) for features in (first_NF, second_NF)]
    spreads = [
        (features - mean) / max(1, len(features) - 1) ** 0.5
        for features, mean in zip((first_NF, second_NF), means, strict=True)
    ]
    shared = torch.linalg.svdvals(spreads[0] @ spreads[1].T).sum()
    total = sum(spread.square().sum() for spread in spreads)
    return float((means[0] - means[1]).square().sum() + total - 2 * shared)


def feature_distance(generated_NF: Tensor, real_NF: Tensor, *, splits: int = SPLITS) -> FeatureDistance:
    """Return the distances between halves, averaged over several ways to halve (each both ways round).

    Raises:
        ValueError: if there aren't as many of each, or fewer than 2.
    """
    count = len(real_NF)
    if len(generated_NF) != count or count < 2:
        raise ValueError(f"needs as many generated as real pictures, at least 2, found {len(generated_NF)} and {count}")
    spread_F = real_NF.std(0).clamp_min(1e-12)
    generated_NF, real_NF = generated_NF / spread_F, real_NF / spread_F
    made, true = [], []
    for split in range(splits):
        order = torch.randperm(count, generator=generator_for("halves", split))
        one, other = order[: count // 2], order[count // 2 : count // 2 * 2]
        made += [frechet(generated_NF[one], real_NF[other]), frechet(generated_NF[other], real_NF[one])]
        true.append(frechet(real_NF[one], real_NF[other]))
    return FeatureDistance(generated=sum(made) / len(made), real=sum(true) / len(true))
