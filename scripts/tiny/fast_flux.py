"""The Flux blocks for training in bfloat16 on a CPU: same parameters and result, elementwise work fused.

torch's matrix products already run at the processor's limit there, but norms, rotations and activations take as long
again; `fast_kernels.cpp` does each in one pass. It is compiled with g++ on first use; where there is none, training
runs on the library's own blocks.

Shape suffixes: B batch, L tokens, H heads, D width, K head width.
"""

import ctypes
import logging
import os
import platform
import subprocess
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from library.flux.layers import DoubleStreamBlock, QKNorm, SingleStreamBlock
from library.flux.model import Flux
from library.flux.text import TextFeatures

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("fast_kernels.cpp")
HEAD_WIDTH = 64  # the only one that the kernels handle
_FAST = ("-O3", "-march=native", "-fopenmp", "-ffast-math", "-mprefer-vector-width=512", "-shared", "-fPIC")


def compile_kernels() -> ctypes.CDLL | None:
    """Return the compiled kernels, or None (with a warning) where no compiler is found."""
    key = sha256(SOURCE.read_bytes() + " ".join(_FAST).encode() + _processor()).hexdigest()[:16]
    # In the user's own folder, not the common temporary one: whoever can write the file decides what code runs.
    library = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "jointdit" / f"kernels_{key}.so"
    library.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not library.exists():
        building = library.with_suffix(f".{os.getpid()}.tmp")
        try:
            subprocess.run(["g++", *_FAST, "-o", building, SOURCE], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            logger.warning("no fused kernels (%s): training is slower", error)
            return None
        building.replace(library)
    return ctypes.CDLL(str(library))


def _processor() -> bytes:
    """Return what tells this kind of processor from others, since the kernels are built for it alone."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}".encode()
    return b"".join(sorted({line for line in lines if line.startswith((b"model name", b"flags", b"Features"))}))


_kernels: ctypes.CDLL | None = None


def _call(name: str, *arguments: Tensor | int) -> None:
    """Call a kernel: tensors go as pointers, numbers as C longs."""
    assert _kernels is not None
    getattr(_kernels, name)(
        *(ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else ctypes.c_long(a) for a in arguments)
    )


class _NormModulate(Function):
    """(1 + scale) LayerNorm(x) + shift; shift and scale may be slices of the modulation's output."""

    @staticmethod
    def forward(ctx: Any, x_BLD: Tensor, shift_BD: Tensor, scale_BD: Tensor) -> Tensor:
        B, L, D = x_BLD.shape
        x_BLD = x_BLD.contiguous()
        out, kept = torch.empty_like(x_BLD), torch.empty(B, L, 2)
        _call("norm_modulate", x_BLD, shift_BD, scale_BD, shift_BD.stride(0), out, kept, B, L, D)
        ctx.save_for_backward(x_BLD, scale_BD, kept)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x_BLD, scale_BD, kept = ctx.saved_tensors
        B, L, D = x_BLD.shape
        dx, dshift, dscale = torch.empty_like(x_BLD), x_BLD.new_empty(B, D), x_BLD.new_empty(B, D)
        stride = scale_BD.stride(0)
        _call(
            "norm_modulate_backward", gradient.contiguous(), x_BLD, scale_BD, stride, kept, dx, dshift, dscale, B, L, D
        )
        return dx, dshift, dscale


class _GateAdd(Function):
    """x + gate (y + bias)."""

    @staticmethod
    def forward(ctx: Any, x_BLD: Tensor, y_BLD: Tensor, bias_D: Tensor, gate_BD: Tensor) -> Tensor:
        B, L, D = x_BLD.shape
        x_BLD, y_BLD = x_BLD.contiguous(), y_BLD.contiguous()
        out = torch.empty_like(x_BLD)
        _call("gate_add", x_BLD, y_BLD, bias_D, gate_BD, gate_BD.stride(0), out, B, L, D)
        ctx.save_for_backward(y_BLD, bias_D, gate_BD)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        y_BLD, bias_D, gate_BD = ctx.saved_tensors
        B, L, D = y_BLD.shape
        gradient = gradient.contiguous()
        dy, dgate = torch.empty_like(y_BLD), y_BLD.new_empty(B, D)
        _call("gate_add_backward", gradient, y_BLD, bias_D, gate_BD, gate_BD.stride(0), dy, dgate, B, L, D)
        return gradient, dy, _column_sums(dy), dgate


class _Split(Function):
    """Add the bias to a projection; cut it into [q, k, v, hidden]: normalised, rotated heads and GELU(hidden).

    GELU's result stands behind D free columns of a buffer, where `_Join` puts the attention's result: what a single
    block's second linear reads. With no hidden columns the buffer is just those D.
    """

    @staticmethod
    def forward(
        ctx: Any, rows_BLR: Tensor, bias_R: Tensor, q_scale: Tensor, k_scale: Tensor, rotary: Tensor, heads: int
    ) -> tuple[Tensor, ...]:
        B, L, R = rows_BLR.shape
        width, cos, sin = heads * HEAD_WIDTH, rotary[0], rotary[1]
        scales, bias = torch.stack([q_scale, k_scale]).float(), bias_R.float()
        q, k, v = (rows_BLR.new_empty(B, heads, L, HEAD_WIDTH) for _ in range(3))
        _call("split_heads", rows_BLR, R, bias, scales[0], scales[1], cos, sin, q, k, v, B, L, heads)
        hidden = R - 3 * width
        buffer = rows_BLR.new_empty(B, L, width + hidden)
        if hidden:
            _call(
                "gelu",
                rows_BLR[..., 3 * width :],
                R,
                bias_R[3 * width :],
                buffer[..., width:],
                width + hidden,
                B * L,
                hidden,
            )
        ctx.save_for_backward(rows_BLR, bias_R, bias, scales, cos, sin)
        ctx.heads = heads
        return q, k, v, buffer

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor, dbuffer: Tensor) -> tuple[Tensor | None, ...]:
        rows_BLR, bias_R, bias, scales, cos, sin = ctx.saved_tensors
        B, L, R = rows_BLR.shape
        width = ctx.heads * HEAD_WIDTH
        out, sums = torch.empty_like(rows_BLR), torch.zeros(B, 2, HEAD_WIDTH)
        gradients = dq.contiguous(), dk.contiguous(), dv.contiguous()
        _call("split_heads_backward", rows_BLR, R, bias, *scales, cos, sin, *gradients, out, sums, B, L, ctx.heads)
        hidden = R - 3 * width
        if hidden:
            before, more, after = rows_BLR[..., 3 * width :], bias_R[3 * width :], out[..., 3 * width :]
            _call("gelu_backward", before, R, more, dbuffer[..., width:], width + hidden, after, R, B * L, hidden)
        dq_scale, dk_scale = sums.sum(0).to(rows_BLR.dtype)
        return out, _column_sums(out), dq_scale, dk_scale, None, None


class _Join(Function):
    """Write the heads (B, H, L, K) into the first D columns of `_Split`'s buffer, in place."""

    @staticmethod
    def forward(ctx: Any, buffer: Tensor, mixed_BHLK: Tensor) -> Tensor:
        B, H, L, _ = mixed_BHLK.shape
        _call("join_heads", mixed_BHLK.contiguous(), buffer, buffer.shape[-1], B, L, H)
        ctx.mark_dirty(buffer)
        ctx.shape = mixed_BHLK.shape
        return buffer

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        B, H, L, _ = ctx.shape
        gradient = gradient.contiguous()
        dmixed = gradient.new_empty(ctx.shape)
        _call("join_heads_backward", gradient, gradient.shape[-1], dmixed, B, L, H)
        return gradient, dmixed


class _Gelu(Function):
    """tanh-GELU of x + bias."""

    @staticmethod
    def forward(ctx: Any, x_BLD: Tensor, bias_D: Tensor) -> Tensor:
        x_BLD = x_BLD.contiguous()
        out, width = torch.empty_like(x_BLD), x_BLD.shape[-1]
        _call("gelu", x_BLD, width, bias_D, out, width, x_BLD.numel() // width, width)
        ctx.save_for_backward(x_BLD, bias_D)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x_BLD, bias_D = ctx.saved_tensors
        out, width = torch.empty_like(x_BLD), x_BLD.shape[-1]
        _call(
            "gelu_backward",
            x_BLD,
            width,
            bias_D,
            gradient.contiguous(),
            width,
            out,
            width,
            x_BLD.numel() // width,
            width,
        )
        return out, _column_sums(out)


def _column_sums(rows_BLD: Tensor) -> Tensor:
    """Gradient of a bias."""
    return rows_BLD.flatten(0, 1).sum(0)


def _mix(q_BHLK: Tensor, k_BHLK: Tensor, v_BHLK: Tensor) -> Tensor:
    """softmax(q k^T) v; q bears the 1 / sqrt(K) already."""
    return (q_BHLK @ k_BHLK.mT).softmax(dim=-1) @ v_BHLK


def _heads(linear: nn.Linear, norm: QKNorm, x_BLD: Tensor, rotary: Tensor, heads: int) -> tuple[Tensor, ...]:
    q_scale = norm.query_norm.scale * HEAD_WIDTH**-0.5
    rows_BLR = x_BLD @ linear.weight.T
    return _Split.apply(rows_BLR, linear.bias, q_scale, norm.key_norm.scale, rotary, heads)


def _gate_add(x_BLD: Tensor, linear: nn.Linear, y_BLD: Tensor, gate_BD: Tensor) -> Tensor:
    """x + gate linear(y)."""
    return _GateAdd.apply(x_BLD, y_BLD @ linear.weight.T, linear.bias, gate_BD)


def _double(
    block: DoubleStreamBlock, img: Tensor, txt: Tensor, vec_BD: Tensor, rotary: Tensor
) -> tuple[Tensor, Tensor]:
    """Run a double-stream block; see `library.flux.layers`."""
    length = txt.shape[1]
    active = F.silu(vec_BD)
    mods, projected = [], []
    for x, mod, attn, table in (
        (txt, block.txt_mod, block.txt_attn, rotary[:, :length]),
        (img, block.img_mod, block.img_attn, rotary[:, length:]),
    ):
        mods.append(mod.lin(active).chunk(6, dim=-1))
        normed = _NormModulate.apply(x, mods[-1][0], mods[-1][1])
        projected.append(_heads(attn.qkv, attn.norm, normed, table.contiguous(), attn.num_heads))
    q, k, v = (torch.cat([txt_part, img_part], dim=-2) for txt_part, img_part in list(zip(*projected, strict=True))[:3])
    txt_mixed, img_mixed = _mix(q, k, v).split([length, img.shape[1]], dim=-2)
    txt = _stream(txt, _Join.apply(projected[0][3], txt_mixed), block.txt_attn.proj, block.txt_mlp, mods[0])
    img = _stream(img, _Join.apply(projected[1][3], img_mixed), block.img_attn.proj, block.img_mlp, mods[1])
    return img, txt


def _stream(x_BLD: Tensor, mixed_BLD: Tensor, proj: nn.Linear, mlp: nn.Sequential, mod: tuple[Tensor, ...]) -> Tensor:
    x_BLD = _gate_add(x_BLD, proj, mixed_BLD, mod[2])
    hidden = _NormModulate.apply(x_BLD, mod[3], mod[4]) @ mlp[0].weight.T
    return _gate_add(x_BLD, mlp[2], _Gelu.apply(hidden, mlp[0].bias), mod[5])


def _last(block: SingleStreamBlock, x_BLD: Tensor, vec_BD: Tensor, rotary: Tensor, *, skip: int) -> Tensor:
    """Run the last single-stream block for all but the first `skip` tokens: nobody reads what it makes of the text."""
    width = block.num_heads * HEAD_WIDTH
    shift, scale, gate = block.modulation.lin(F.silu(vec_BD)).chunk(3, dim=-1)
    normed = _NormModulate.apply(x_BLD, shift, scale)
    q_scale = block.norm.query_norm.scale * HEAD_WIDTH**-0.5
    weights, biases = (
        part.split([3 * width, len(part) - 3 * width]) for part in (block.linear1.weight, block.linear1.bias)
    )
    q, k, v, buffer = _Split.apply(
        normed @ weights[0].T, biases[0], q_scale, block.norm.key_norm.scale, rotary, block.num_heads
    )
    mixed = _Join.apply(
        torch.empty_like(buffer[:, skip:], memory_format=torch.contiguous_format), _mix(q[:, :, skip:], k, v)
    )
    hidden = _Gelu.apply(normed[:, skip:] @ weights[1].T, biases[1])
    return _gate_add(x_BLD[:, skip:], block.linear2, torch.cat([mixed, hidden], dim=-1), gate)


def _single(block: SingleStreamBlock, x_BLD: Tensor, vec_BD: Tensor, rotary: Tensor) -> Tensor:
    """Run a single-stream block; see `library.flux.layers`."""
    shift, scale, gate = block.modulation.lin(F.silu(vec_BD)).chunk(3, dim=-1)
    normed = _NormModulate.apply(x_BLD, shift, scale)
    q, k, v, buffer = _heads(block.linear1, block.norm, normed, rotary, block.num_heads)
    return _gate_add(x_BLD, block.linear2, _Join.apply(buffer, _mix(q, k, v)), gate)


class FastFlux:
    """Calls a bfloat16 `Flux` through the fused blocks; `make` says whether that is possible."""

    def __init__(self, flux: Flux) -> None:
        self.flux = flux

    @staticmethod
    def make(flux: Flux) -> "FastFlux | None":
        """Return the fast form of `flux`, or None where there is no compiler or its heads have another width."""
        global _kernels
        if flux.config.head_width != HEAD_WIDTH:
            return None
        _kernels = _kernels or compile_kernels()
        return FastFlux(flux) if _kernels is not None else None

    def __call__(
        self, x_BLD: Tensor, *, t_B: Tensor, guidance_B: Tensor, text: TextFeatures, image_ids: Tensor, tap: int
    ) -> tuple[Tensor, Tensor]:
        """Predict the velocity, and return the image tokens after single-stream block `tap` too.

        Shapes as in `Flux.forward`, one leading axis, no text mask.
        """
        flux = self.flux
        assert _kernels is not None
        _kernels.use_threads(ctypes.c_long(torch.get_num_threads()))
        vec_BD = flux.embed_condition(t_B, pooled_BD=text.pooled_BD, guidance_B=guidance_B)
        table = flux.rotary(text, image_ids=image_ids)[0]
        rotary = torch.stack([table[..., 0], table[..., 1]])  # (2, L, K / 2): cosines, sines
        img, txt = flux.img_in(x_BLD), flux.txt_in(text.tokens_BLD)
        for block in flux.double_blocks:
            img, txt = _double(block, img, txt, vec_BD, rotary)
        joined = torch.cat([txt, img], dim=1)
        *blocks, last = flux.single_blocks
        for index, block in enumerate(blocks):
            joined = _single(block, joined, vec_BD, rotary)
            if index == tap:
                tapped = joined[:, txt.shape[1] :]
        img = _last(last, joined, vec_BD, rotary, skip=txt.shape[1])
        shift, scale = flux.final_layer.adaLN_modulation(vec_BD).chunk(2, dim=-1)
        return flux.final_layer.linear(_NormModulate.apply(img, shift, scale)), tapped
