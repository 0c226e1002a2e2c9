"""Noise levels at which a sampler calls the model."""

import math

import torch

SHIFT_AT_256_TOKENS = 0.5  # mu of FLUX.1-dev's schedule, linear in the number of image tokens and not clamped
SHIFT_AT_4096_TOKENS = 1.15


def native_shift(tokens: int) -> float:
    """e^mu for this many image tokens of one modality: the factor by which FLUX.1-dev's noise levels are shifted."""
    slope = (SHIFT_AT_4096_TOKENS - SHIFT_AT_256_TOKENS) / (4096 - 256)
    return math.exp(SHIFT_AT_256_TOKENS + slope * (tokens - 256))


def timestep_schedule(steps: int, tokens: int, *, shift: bool = True) -> list[float]:
    """`steps` + 1 noise levels from 1 to 0: linear, then t' = e^mu / (e^mu + 1/t - 1) (Esser et al., arXiv 2403.03206).

    Args:
        steps: number of model calls, at least 1.
        tokens: image tokens of ONE modality; more tokens stay longer at high noise.
        shift: False leaves the linear schedule (schnell).
    """
    if steps < 1:
        raise ValueError(f"steps {steps}: at least 1 is needed")
    t = torch.linspace(1, 0, steps + 1)
    if shift:
        factor = native_shift(tokens)
        t = factor / (factor + (1 / t - 1))
    return t.tolist()
