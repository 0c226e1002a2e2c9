"""Stochastic rounding to bfloat16: up or down with the chances that leave the mean where it was.

Rounding to the nearest loses every step smaller than half the spacing of bfloat16, 1/256 of the weight; rounded
stochastically, small steps arrive on average (Zamirai et al., "Revisiting BFloat16 Training", arXiv 2010.06192).
"""

import torch
from torch import Tensor

_DROPPED_BITS = 16  # a bfloat16 is a float32 without its last 16 bits


def round_stochastically(x: Tensor, *, generator: torch.Generator) -> Tensor:
    """Round float32 to bfloat16 without bias: E[result] = x; what bfloat16 can hold stays as it is.

    `generator` must be on the device of `x`. Infinities and NaN stay what they are.
    """
    noise = torch.empty(x.shape, dtype=torch.int32, device=x.device)
    noise.random_(0, 1 << _DROPPED_BITS, generator=generator)
    # Added below the last kept bit, the noise carries into it with a chance proportional to what is cut off.
    bits = noise.add_(x.view(torch.int32)).bitwise_and_(-(1 << _DROPPED_BITS))
    # CUDA's NaN has all bits set: with noise added it would overflow to -0 and hide that training has failed.
    return torch.where(x.isfinite(), bits.view(torch.float32), x).to(torch.bfloat16)
