"""Frozen linear layers in 8 or 4 bits: less memory for the backbone; what is trained keeps its precision.

Only weights are packed; they are unpacked to the precision of the computation for the time of one product, in the
forward and again in the backward pass. Formats:

- int8: 1 byte a weight, a scale for each output channel; the embedded model's velocities are off by 1 %.
- fp8: 1 byte, float8_e4m3fn with a scale for each output channel; off by 3 %.
- nf4: 0.56 byte, 16 levels at the quantiles of a normal distribution and a scale for each 64 weights (Dettmers et al.,
  "QLoRA", arXiv 2305.14314), by bitsandbytes; off by 15 %.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.errors import UserError
from library.jointdit.lora import LoRALinear
from library.jointdit.model import JointDiT

_INT8_LIMIT = 127.0
_FP8_LIMIT = torch.finfo(torch.float8_e4m3fn).max
_NF4_BLOCK = 64

Parts = Sequence[Tensor]  # packed weight, its scales


@dataclass(frozen=True, kw_only=True, slots=True)
class Format:
    """How weights (out, in) are packed, and unpacked to a shape and a type."""

    pack: Callable[[Tensor], Parts]
    unpack: Callable[[Parts, torch.Size, torch.dtype], Tensor]


def _channel_scales(weight: Tensor, limit: float) -> Tensor:
    """Scales (out, 1) that bring each output channel's largest weight to `limit`."""
    return weight.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / limit


def _pack_int8(weight: Tensor) -> Parts:
    scales = _channel_scales(weight, _INT8_LIMIT)
    return (weight / scales).round().to(torch.int8), scales


def _pack_fp8(weight: Tensor) -> Parts:
    scales = _channel_scales(weight, _FP8_LIMIT)
    return (weight / scales).clamp(-_FP8_LIMIT, _FP8_LIMIT).to(torch.float8_e4m3fn), scales


def _unpack_scaled(parts: Parts, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    packed, scales = parts
    return packed.to(dtype).mul_(scales)  # the product is taken in float32 and rounded once


def _pack_nf4(weight: Tensor) -> Parts:
    packed, state = _bitsandbytes().quantize_4bit(weight, blocksize=_NF4_BLOCK, quant_type="nf4")
    return packed, state.absmax


def _unpack_nf4(parts: Parts, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    packed, scales = parts
    functional = _bitsandbytes()
    state = functional.QuantState(absmax=scales, shape=shape, dtype=dtype, blocksize=_NF4_BLOCK, quant_type="nf4")
    unpacked: Tensor = functional.dequantize_4bit(packed, quant_state=state)
    return unpacked


def _bitsandbytes() -> Any:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it misses a kernel for CPUs that isn't used here
    try:
        from bitsandbytes import functional
    except ImportError as error:
        raise UserError(
            f"--base_precision nf4: bitsandbytes can't be imported ({error}); pip install -e '.[gpu]', or use int8"
        ) from error
    return functional


FORMATS = {
    "int8": Format(pack=_pack_int8, unpack=_unpack_scaled),
    "fp8": Format(pack=_pack_fp8, unpack=_unpack_scaled),
    "nf4": Format(pack=_pack_nf4, unpack=_unpack_nf4),
}


def quantize_base(model: JointDiT, kind: str | None, *, device: torch.device | str = "cpu") -> None:
    """Pack the weights of all frozen linear layers of the blocks; None leaves the model as it is.

    To be called before blocks are placed and wrapped. Each weight is packed on `device` (a GPU is quicker) and stays
    where it was. Biases, norms, the layers before and after the blocks and all add-ons are left alone.

    Raises:
        UserError: the package that packs isn't installed.
    """
    if kind is None:
        return
    trained = set(model.trainable_names())
    for name, module in model.named_modules():
        inside = name.startswith(("double_blocks.", "single_blocks."))
        if inside and isinstance(module, nn.Linear) and f"{name}.weight" not in trained:
            quantize_linear(module, kind, device=device)


@torch.no_grad()
def quantize_linear(layer: nn.Linear, kind: str, *, device: torch.device | str = "cpu") -> None:
    """Replace a layer's weight by packed ones, in place; of a `LoRALinear` the branch is left alone."""
    weight = layer.weight
    unpack = FORMATS[kind].unpack
    del layer.weight
    for name, part in zip(_PARTS, FORMATS[kind].pack(weight.to(device).float()), strict=True):
        setattr(layer, name, nn.Parameter(part.to(weight.device), requires_grad=False))
    shape = weight.shape

    def forward(x: Tensor) -> Tensor:
        kind_of_device = x.device.type
        autocast = torch.is_autocast_enabled(kind_of_device)
        dtype = torch.get_autocast_dtype(kind_of_device) if autocast else x.dtype
        parts = [getattr(layer, name) for name in _PARTS]  # at each use: block swap puts others in their place
        product = _PackedProduct.apply(x.to(dtype), shape, unpack, *parts)
        # A new tensor in any case: autograd forbids adding to a part of what a function of ours returned.
        return product.clone() if layer.bias is None else product + layer.bias.to(dtype)

    if isinstance(layer, LoRALinear):
        layer.frozen = forward  # type: ignore[method-assign]
    else:
        layer.forward = forward  # type: ignore[method-assign, assignment]


_PARTS = ("weight_packed", "weight_scales")


class _PackedProduct(torch.autograd.Function):
    """x W^T that keeps the packed weight for its backward pass, not the unpacked one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: torch.Size, unpack: Any, *parts: Tensor) -> Tensor:
        ctx.save_for_backward(*parts)
        ctx.shape, ctx.unpack = shape, unpack
        return F.linear(x, unpack(parts, shape, x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        parts = ctx.saved_tensors
        return gradient @ ctx.unpack(parts, ctx.shape, gradient.dtype), None, None, *(None for _ in parts)
