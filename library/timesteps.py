"""Noise levels for training pairs.

Shape suffixes: M modality (RGB, depth), B batch.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from library.flux.schedule import native_shift
from library.modality import MODALITIES

SHIFT = 3.1582  # of f: the density the backbone was tuned with
CLEAN_SHIFT = 0.25  # of g: the density of the cleaner modality


class Density(Protocol):
    """Makes noise levels in (0, 1) of standard normal numbers, moved towards noise by `shift` (1 doesn't move them)."""

    def __call__(self, z: Tensor, *, shift: float) -> Tensor:
        """Return levels of the shape of `z`."""
        ...


def shifted_logit_normal(z: Tensor, *, shift: float) -> Tensor:
    """t = sigmoid(z + ln shift): with normal z a logit-normal density whose median is shift / (1 + shift)."""
    return torch.sigmoid(z + math.log(shift))


def shifted_uniform(z: Tensor, *, shift: float) -> Tensor:
    """t = shift u / (1 + (shift - 1) u), u = Phi(z): uniform for shift 1; the median is shift / (1 + shift) too."""
    u = torch.special.ndtr(z)
    return shift * u / (1 + (shift - 1) * u)


@dataclass(frozen=True, kw_only=True, slots=True)
class TimestepSampling:
    """A way to draw noise levels: a density, and f's shift by the flag's shift and the tokens of one modality."""

    density: Density
    shift: Callable[[float, int], float]


SAMPLINGS = {
    "shift": TimestepSampling(density=shifted_logit_normal, shift=lambda shift, tokens: shift),
    "flux_shift": TimestepSampling(density=shifted_logit_normal, shift=lambda shift, tokens: native_shift(tokens)),
    "sigmoid": TimestepSampling(density=shifted_logit_normal, shift=lambda shift, tokens: 1.0),
    "uniform": TimestepSampling(density=shifted_uniform, shift=lambda shift, tokens: 1.0),
}
"""Values of `--timestep_sampling`; `shift` is the paper's."""


def sample_pair_timesteps(
    batch: int,
    *,
    shift: float = SHIFT,
    clean_shift: float = CLEAN_SHIFT,
    unbalanced: bool = True,
    density: Density = shifted_logit_normal,
    generators: Sequence[torch.Generator],
) -> Tensor:
    """Draw (t_rgb, t_depth) for a batch: unbalanced time-step sampling (JointDiT, section 3.1).

    With f = density(z1, shift) and g = density(z2, clean_shift): half of the pairs are (f, f), a quarter (f, g), a
    quarter (g, f). Without `unbalanced` both levels are drawn from f on their own (the paper's ablation).

    Args:
        batch: number of pairs B.
        shift: of f, above 0.
        clean_shift: of g, above 0.
        unbalanced: False for the ablation.
        density: of both; the paper's is logit-normal: sigmoid(z + ln shift).
        generators: one for each pair, so that a pair's levels don't depend on its batch mates.

    Returns:
        Noise levels in (0, 1), float32, (M, B) on the CPU.
    """
    if len(generators) != batch:
        raise ValueError(f"{batch} pairs need as many generators, not {len(generators)}")
    z_B2 = torch.stack([torch.randn(len(MODALITIES), generator=generator) for generator in generators])
    if not unbalanced:
        return density(z_B2, shift=shift).T.contiguous()
    choice_B = torch.stack([torch.randint(4, (), generator=generator) for generator in generators])
    f_B = density(z_B2[:, 0], shift=shift)
    g_B = density(z_B2[:, 1], shift=clean_shift)
    rgb_B = torch.where(choice_B == 3, g_B, f_B)
    depth_B = torch.where(choice_B == 2, g_B, f_B)
    return torch.stack([rgb_B, depth_B])
