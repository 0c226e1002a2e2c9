"""Layers of the FLUX.1 transformer, under the released parameter names.

Shape suffixes: B batch, L tokens, H heads, D width, K head width; any leading axes may stand in place of B.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from library.flux.attention import Attention
from library.flux.variants import FluxConfig

TIME_FACTOR = 1000.0  # noise levels are in [0, 1]; the sinusoids were trained on [0, 1000]
TIME_CHANNELS = 256
MAX_PERIOD = 10_000.0


def sinusoidal_embedding(t_B: Tensor, *, channels: int = TIME_CHANNELS) -> Tensor:
    """Sinusoidal embedding [cos, sin] of numbers, (...) -> (..., channels), in the dtype of the input.

    The product with 1000 is taken in that dtype too, as in the released code: under bfloat16 both are rounded.
    """
    half = channels // 2
    frequencies = torch.exp(-math.log(MAX_PERIOD) * torch.arange(half, dtype=torch.float32, device=t_B.device) / half)
    angles = (TIME_FACTOR * t_B)[..., None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1).to(t_B.dtype)


def rotary_table(ids_L3: Tensor, *, axes_dim: tuple[int, ...], theta: int) -> Tensor:
    """Cosines and sines of the rotary embedding (Su et al., arXiv 2104.09864), one frequency band for each axis.

    `ids_L3` (..., L, 3) positions -> (..., 1, L, K/2, 2) float32; angles are taken in float64, as in the released code.
    """
    angles = []
    for axis, width in enumerate(axes_dim):
        exponent = torch.arange(0, width, 2, dtype=torch.float64, device=ids_L3.device) / width
        angles.append(ids_L3[..., axis, None].double() * theta**-exponent)
    angle = torch.cat(angles, dim=-1)
    return torch.stack([angle.cos(), angle.sin()], dim=-1).float().unsqueeze(-4)


def rotate(x_BHLK: Tensor, table: Tensor) -> Tensor:
    """Turn each pair of neighbouring channels by its angle; computed in float32, returned in the input's dtype."""
    even, odd = x_BHLK.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = table.unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).type_as(x_BHLK)


class MLPEmbedder(nn.Module):
    """Linear, SiLU, Linear: embeds the noise level, the guidance and the pooled text."""

    def __init__(self, in_width: int, width: int):
        super().__init__()
        self.in_layer = nn.Linear(in_width, width)
        self.out_layer = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Embed (..., in_width) as (..., width)."""
        return self.out_layer(F.silu(self.in_layer(x)))


class RMSNorm(nn.Module):
    """x / rms(x) * scale over the last axis; the norm is taken in float32."""

    def __init__(self, width: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (..., width)."""
        return F.rms_norm(x.float(), self.scale.shape, eps=1e-6).to(x.dtype) * self.scale


class QKNorm(nn.Module):
    """Normalises queries and keys head by head."""

    def __init__(self, head_width: int):
        super().__init__()
        self.query_norm = RMSNorm(head_width)
        self.key_norm = RMSNorm(head_width)

    def forward(self, q_BHLK: Tensor, k_BHLK: Tensor, v_BHLK: Tensor) -> tuple[Tensor, Tensor]:
        """Return normalised q and k in the dtype of v."""
        return self.query_norm(q_BHLK).to(v_BHLK), self.key_norm(k_BHLK).to(v_BHLK)


class StreamAttention(nn.Module):
    """The projections of one stream of a double block; the attention itself is the block's business."""

    def __init__(self, config: FluxConfig):
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.qkv_bias)
        self.norm = QKNorm(config.head_width)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def heads(self, x_BLD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised q, k and plain v, each (..., H, L, K)."""
        q, k, v = split_heads(self.qkv(x_BLD), self.num_heads)
        return *self.norm(q, k, v), v


def split_heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Cut (..., L, 3 D) into q, k, v of (..., H, L, K)."""
    q, k, v = rearrange(qkv, "... L (three H K) -> three ... H L K", three=3, H=num_heads)
    return q, k, v


class Modulation(nn.Module):
    """Shift, scale and gate from the conditioning vector (Peebles & Xie, arXiv 2212.09748)."""

    def __init__(self, width: int, *, sets: int):
        super().__init__()
        self.sets = sets
        self.lin = nn.Linear(width, 3 * sets * width)

    def forward(self, vec_BD: Tensor) -> tuple[Tensor, ...]:
        """Return 3 * sets tensors of (..., 1, D): shift, scale, gate of each set."""
        return self.lin(F.silu(vec_BD))[..., None, :].chunk(3 * self.sets, dim=-1)


def modulated_norm(x_BLD: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """(1 + scale) LayerNorm(x) + shift, the norm without parameters of its own."""
    return (1 + scale) * F.layer_norm(x_BLD, x_BLD.shape[-1:], eps=1e-6) + shift


def feed_forward(config: FluxConfig) -> nn.Sequential:
    """Linear, tanh-GELU, Linear."""
    return nn.Sequential(
        nn.Linear(config.hidden_size, config.mlp_width),
        nn.GELU(approximate="tanh"),
        nn.Linear(config.mlp_width, config.hidden_size),
    )


class DoubleStreamBlock(nn.Module):
    """MM-DiT block (Esser et al., arXiv 2403.03206): image and text have weights of their own and attend together."""

    def __init__(self, config: FluxConfig):
        super().__init__()
        self.img_mod = Modulation(config.hidden_size, sets=2)
        self.img_attn = StreamAttention(config)
        self.img_mlp = feed_forward(config)
        self.txt_mod = Modulation(config.hidden_size, sets=2)
        self.txt_attn = StreamAttention(config)
        self.txt_mlp = feed_forward(config)

    def forward(
        self, img_BLD: Tensor, txt_BLD: Tensor, *, vec_BD: Tensor, rotary: Tensor, attention: Attention
    ) -> tuple[Tensor, Tensor]:
        """Return the two streams, shapes unchanged; attention runs over [text, image]."""
        img_shift1, img_scale1, img_gate1, img_shift2, img_scale2, img_gate2 = self.img_mod(vec_BD)
        txt_shift1, txt_scale1, txt_gate1, txt_shift2, txt_scale2, txt_gate2 = self.txt_mod(vec_BD)

        img_heads = self.img_attn.heads(modulated_norm(img_BLD, img_shift1, img_scale1))
        txt_heads = self.txt_attn.heads(modulated_norm(txt_BLD, txt_shift1, txt_scale1))
        q, k, v = (torch.cat([txt, img], dim=-2) for txt, img in zip(txt_heads, img_heads, strict=True))
        mixed = attention(self, rotate(q, rotary), rotate(k, rotary), v)
        txt_mixed, img_mixed = mixed.split([txt_BLD.shape[-2], img_BLD.shape[-2]], dim=-2)

        img_BLD = img_BLD + img_gate1 * self.img_attn.proj(img_mixed)
        img_BLD = img_BLD + img_gate2 * self.img_mlp(modulated_norm(img_BLD, img_shift2, img_scale2))
        txt_BLD = txt_BLD + txt_gate1 * self.txt_attn.proj(txt_mixed)
        txt_BLD = txt_BLD + txt_gate2 * self.txt_mlp(modulated_norm(txt_BLD, txt_shift2, txt_scale2))
        return img_BLD, txt_BLD


class SingleStreamBlock(nn.Module):
    """P-DiT block: attention and feed-forward side by side (Dehghani et al., arXiv 2302.05442) on [text, image]."""

    def __init__(self, config: FluxConfig):
        super().__init__()
        self.num_heads = config.num_heads
        self.widths = [3 * config.hidden_size, config.mlp_width]
        self.modulation = Modulation(config.hidden_size, sets=1)
        self.linear1 = nn.Linear(config.hidden_size, sum(self.widths))
        self.norm = QKNorm(config.head_width)
        self.linear2 = nn.Linear(config.hidden_size + config.mlp_width, config.hidden_size)

    def forward(self, x_BLD: Tensor, *, vec_BD: Tensor, rotary: Tensor, attention: Attention) -> Tensor:
        """Return the joined stream, shape unchanged."""
        shift, scale, gate = self.modulation(vec_BD)
        qkv, hidden = self.linear1(modulated_norm(x_BLD, shift, scale)).split(self.widths, dim=-1)
        q, k, v = split_heads(qkv, self.num_heads)
        q, k = self.norm(q, k, v)
        mixed = attention(self, rotate(q, rotary), rotate(k, rotary), v)
        return x_BLD + gate * self.linear2(torch.cat([mixed, F.gelu(hidden, approximate="tanh")], dim=-1))


class LastLayer(nn.Module):
    """Modulated norm and the projection to velocities."""

    def __init__(self, width: int, out_channels: int):
        super().__init__()
        self.linear = nn.Linear(width, out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x_BLD: Tensor, vec_BD: Tensor) -> Tensor:
        """Project (..., L, D) to (..., L, out_channels)."""
        shift, scale = self.adaLN_modulation(vec_BD)[..., None, :].chunk(2, dim=-1)
        return self.linear(modulated_norm(x_BLD, shift, scale))
