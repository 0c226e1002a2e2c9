"""Attention kernels and the attention of a plain Flux block.

Shape suffixes: B batch, H heads, L tokens, K head width, D = H K; any leading axes may stand in place of B.
"""

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def sdpa(q_BHLK: Tensor, k_BHLK: Tensor, v_BHLK: Tensor, mask: Tensor | None) -> Tensor:
    """PyTorch's fused attention: softmax(q k^T / sqrt(K)) v; a boolean mask is True where a key may be read."""
    return F.scaled_dot_product_attention(q_BHLK, k_BHLK, v_BHLK, attn_mask=mask)


def matmul(q_BHLK: Tensor, k_BHLK: Tensor, v_BHLK: Tensor, mask: Tensor | None) -> Tensor:
    """The same by two plain matrix products: faster than `sdpa` for bfloat16 on CPUs with short sequences."""
    scores = (q_BHLK * q_BHLK.shape[-1] ** -0.5) @ k_BHLK.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(dim=-1) @ v_BHLK


def xformers(q_BHLK: Tensor, k_BHLK: Tensor, v_BHLK: Tensor, mask: Tensor | None) -> Tensor:
    """The same through xformers' memory-efficient attention (CUDA only; imported on first use)."""
    from xformers.ops import memory_efficient_attention

    bias = None
    if mask is not None:
        shape = (*q_BHLK.shape[:3], k_BHLK.shape[2])
        bias = torch.zeros(shape, dtype=q_BHLK.dtype, device=q_BHLK.device).masked_fill(~mask, float("-inf"))
    out = memory_efficient_attention(
        q_BHLK.transpose(1, 2), k_BHLK.transpose(1, 2), v_BHLK.transpose(1, 2), attn_bias=bias
    )
    return out.transpose(1, 2)


KERNELS: dict[str, Kernel] = {"sdpa": sdpa, "matmul": matmul, "xformers": xformers}


def attend(q_BHLK: Tensor, k_BHLK: Tensor, v_BHLK: Tensor, *, mask_BL: Tensor | None, kernel: Kernel) -> Tensor:
    """Run a kernel on tensors with any leading axes and join the heads: returns (..., L, D).

    `mask_BL` (..., L) boolean or 0/1, 1 where a key may be read by every query; None reads all.
    """
    leading = q_BHLK.shape[:-3]
    mask = None
    if mask_BL is not None:
        mask = mask_BL.to(torch.bool).expand(*leading, -1).reshape(-1, 1, 1, mask_BL.shape[-1])
    q, k, v = (x.reshape(-1, *x.shape[-3:]) for x in (q_BHLK, k_BHLK, v_BHLK))
    out = rearrange(kernel(q, k, v, mask), "B H L K -> B L (H K)")
    return out.reshape(*leading, *out.shape[-2:])


class Attention(Protocol):
    """What a block calls: it hands itself over, so that an attention may use parameters that it keeps on the block."""

    def __call__(self, block: nn.Module, q_BHLK: Tensor, k_BHLK: Tensor, v_BHLK: Tensor, /) -> Tensor:
        """Return (..., L, D) for normalised and rotated q, k and plain v, each (..., H, L, K)."""
        ...


class SelfAttention:
    """Every token of a sample reads every token of the same sample (Flux as published)."""

    def __init__(self, *, mask_BL: Tensor | None, kernel: Kernel):
        self.mask_BL = mask_BL
        self.kernel = kernel

    def __call__(self, block: nn.Module, q_BHLK: Tensor, k_BHLK: Tensor, v_BHLK: Tensor) -> Tensor:
        """Return softmax(q k^T / sqrt(K)) v with the heads joined, (..., L, D)."""
        return attend(q_BHLK, k_BHLK, v_BHLK, mask_BL=self.mask_BL, kernel=self.kernel)
