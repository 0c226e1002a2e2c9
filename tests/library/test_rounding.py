"""Stochastic rounding: without bias, only to the two neighbours, and nothing lost that fits."""

import torch

from library.randomness import generator_for
from library.rounding import round_stochastically


def values(count: int = 4000) -> torch.Tensor:
    generator = generator_for("values")
    return torch.randn(count, generator=generator) * 10 ** torch.empty(count).uniform_(-6, 3, generator=generator)


def test_the_mean_of_many_roundings_is_the_value():
    x = values()
    draws = 400
    mean = sum(round_stochastically(x, generator=generator_for("draw", draw)).double() for draw in range(draws)) / draws
    below = x.view(torch.int32).bitwise_and(-65536).view(torch.float32)
    above = (below.view(torch.int32) + 65536).view(torch.float32)
    chance = ((x - below) / (above - below)).double()
    error = (above - below).abs().double() * (chance * (1 - chance) / draws).sqrt()
    score = ((mean - x) / error)[error > 0]
    assert score.abs().max() < 5.5  # 4,000 normal values: 5.5 standard errors are exceeded once in 6,000 runs
    assert abs(score.mean()) < 5 / len(score) ** 0.5 and abs(score.std() - 1) < 0.1


def test_results_are_the_neighbours():
    x = values()
    rounded = round_stochastically(x, generator=generator_for(0)).float()
    spacing = (x.to(torch.bfloat16).float().abs() / 128).clamp_min(torch.finfo(torch.float32).tiny)
    assert ((rounded - x).abs() < spacing).all()
    assert (rounded != x.to(torch.bfloat16).float()).any()


def test_what_fits_stays():
    fits = torch.cat([values().to(torch.bfloat16).float(), torch.tensor([0.0, -0.0, float("inf"), float("-inf")])])
    rounded = round_stochastically(fits, generator=generator_for(0))
    assert rounded.dtype == torch.bfloat16 and torch.equal(rounded.float(), fits)
    # The CPU's NaN, CUDA's (all bits set but the sign) and the smallest of either sign.
    patterns = torch.tensor([0x7FC00000, 0x7FFFFFFF, 0x7F800001, -0x400000, -1, -0x7FFFFF], dtype=torch.int32)
    assert round_stochastically(patterns.view(torch.float32), generator=generator_for(0)).isnan().all()
