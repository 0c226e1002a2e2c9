"""Noise levels for training pairs.

Shape suffixes: M modality (RGB, depth), B batch.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from library.modality import MODALITIES

SHIFT = 3.1582  # of f: the density the backbone was tuned with
CLEAN_SHIFT = 0.25  # of g: the density of the cleaner modality


def shifted_logit_normal(z: Tensor, *, shift: float) -> Tensor:
    """t = sigmoid(z + ln shift): with normal z a logit-normal density whose median is shift / (1 + shift)."""
    return torch.sigmoid(z + math.log(shift))


def sample_pair_timesteps(
    batch: int,
    *,
    shift: float = SHIFT,
    clean_shift: float = CLEAN_SHIFT,
    unbalanced: bool = True,
    generators: Sequence[torch.Generator],
) -> Tensor:
    """Draw (t_rgb, t_depth) for a batch: unbalanced time-step sampling (JointDiT, section 3.1).

    With f = sigmoid(z1 + ln shift) and g = sigmoid(z2 + ln clean_shift): half of the pairs are (f, f), a quarter
    (f, g), a quarter (g, f). Without `unbalanced` both levels are drawn from f on their own (the paper's ablation).

    Args:
        batch: number of pairs B.
        shift: of f, above 0.
        clean_shift: of g, above 0.
        unbalanced: False for the ablation.
        generators: one for each pair, so that a pair's levels don't depend on its batch mates.

    Returns:
        Noise levels in (0, 1), float32, (M, B) on the CPU.
    """
    if len(generators) != batch:
        raise ValueError(f"{batch} pairs need as many generators, not {len(generators)}")
    z_B2 = torch.stack([torch.randn(len(MODALITIES), generator=generator) for generator in generators])
    if not unbalanced:
        return shifted_logit_normal(z_B2, shift=shift).T.contiguous()
    choice_B = torch.stack([torch.randint(4, (), generator=generator) for generator in generators])
    f_B = shifted_logit_normal(z_B2[:, 0], shift=shift)
    g_B = shifted_logit_normal(z_B2[:, 1], shift=clean_shift)
    rgb_B = torch.where(choice_B == 3, g_B, f_B)
    depth_B = torch.where(choice_B == 2, g_B, f_B)
    return torch.stack([rgb_B, depth_B])
