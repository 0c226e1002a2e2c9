"""The FLUX.1 autoencoder: pixels <-> latents, a factor of 8 in each direction and 16 channels.

Shapes: B batch, C channels, h w rows and columns (of pixels or of latents), L = h * w positions.
Module names are those of the released `ae.safetensors`.
"""

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from library.flux.variants import AutoencoderConfig


def _norm(channels: int, groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(num_groups=groups, num_channels=channels, eps=1e-6)


class ResnetBlock(nn.Module):
    """Two normalised 3 x 3 convolutions beside a shortcut, which is 1 x 1 where the width changes."""

    def __init__(self, channels_in: int, channels_out: int, *, groups: int) -> None:
        super().__init__()
        self.norm1 = _norm(channels_in, groups)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.norm2 = _norm(channels_out, groups)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        if channels_in != channels_out:
            self.nin_shortcut = nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, x_BChw: Tensor) -> Tensor:
        """Return the shortcut plus the residual branch, (B, channels_out, h, w)."""
        residual = self.conv1(F.silu(self.norm1(x_BChw)))
        residual = self.conv2(F.silu(self.norm2(residual)))
        shortcut = self.nin_shortcut(x_BChw) if hasattr(self, "nin_shortcut") else x_BChw
        return shortcut + residual


class AttentionBlock(nn.Module):
    """Self-attention with one head over all positions."""

    def __init__(self, channels: int, *, groups: int) -> None:
        super().__init__()
        self.norm = _norm(channels, groups)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x_BChw: Tensor) -> Tensor:
        """Return the input plus what each position read from all the others."""
        normed = self.norm(x_BChw)
        # The one head as an axis of its own, C contiguous: else no fused kernel takes it, and memory grows with L^2.
        q, k, v = (layer(normed).flatten(2).mT.contiguous().unsqueeze(1) for layer in (self.q, self.k, self.v))
        read_BLC = F.scaled_dot_product_attention(q, k, v).squeeze(1)
        return x_BChw + self.proj_out(read_BLC.mT.reshape(x_BChw.shape))


class Middle(nn.Module):
    """The lowest resolution: a res block on each side of the attention."""

    def __init__(self, channels: int, *, groups: int) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, groups=groups)
        self.attn_1 = AttentionBlock(channels, groups=groups)
        self.block_2 = ResnetBlock(channels, channels, groups=groups)

    def forward(self, x_BChw: Tensor) -> Tensor:
        """Keep the shape."""
        return self.block_2(self.attn_1(self.block_1(x_BChw)))


class Downsample(nn.Module):
    """Halve both sides; the padding is at the right and the bottom only, as in the released weights."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x_BChw: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h / 2, w / 2)."""
        return self.conv(F.pad(x_BChw, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double both sides."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x_BChw: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, 2 h, 2 w)."""
        return self.conv(F.interpolate(x_BChw, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The res blocks of one resolution, then, except at the last level on the way, the step to the next one."""

    def __init__(self, channels_in: int, channels_out: int, *, blocks: int, groups: int) -> None:
        super().__init__()
        widths = [channels_in] + [channels_out] * blocks
        self.block = nn.ModuleList(ResnetBlock(a, b, groups=groups) for a, b in zip(widths, widths[1:], strict=False))

    def forward(self, x_BChw: Tensor) -> Tensor:
        """Run the blocks, then `downsample` or `upsample` where this level has one."""
        for block in self.block:
            x_BChw = block(x_BChw)
        for name in ("downsample", "upsample"):
            if hasattr(self, name):
                x_BChw = getattr(self, name)(x_BChw)
        return x_BChw


class Encoder(nn.Module):
    """Pixels (B, 3, 8 h, 8 w) -> the posterior's mean and log-variance side by side (B, 2 C, h, w)."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths = [config.ch * factor for factor in (1, *config.ch_mult)]
        groups = config.num_groups
        self.conv_in = nn.Conv2d(config.in_channels, config.ch, 3, padding=1)
        self.down = nn.ModuleList(
            Level(a, b, blocks=config.num_res_blocks, groups=groups) for a, b in zip(widths, widths[1:], strict=False)
        )
        for level, width in zip(self.down[:-1], widths[1:], strict=False):
            level.downsample = Downsample(width)
        self.mid = Middle(widths[-1], groups=groups)
        self.norm_out = _norm(widths[-1], groups)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.z_channels, 3, padding=1)

    def forward(self, x_BChw: Tensor) -> Tensor:
        """Encode; both sides must be multiples of 8."""
        x_BChw = self.conv_in(x_BChw)
        for level in self.down:
            x_BChw = level(x_BChw)
        return self.conv_out(F.silu(self.norm_out(self.mid(x_BChw))))


class Decoder(nn.Module):
    """Unscaled latents (B, C, h, w) -> pixels (B, 3, 8 h, 8 w)."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths = [config.ch * factor for factor in (*config.ch_mult, config.ch_mult[-1])]
        groups = config.num_groups
        self.conv_in = nn.Conv2d(config.z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], groups=groups)
        # Numbered by resolution as in the encoder, so level 0 is the finest and runs last.
        self.up = nn.ModuleList(
            Level(a, b, blocks=config.num_res_blocks + 1, groups=groups)
            for b, a in zip(widths, widths[1:], strict=False)
        )
        for level, width in zip(self.up[1:], widths[1:], strict=False):
            level.upsample = Upsample(width)
        self.norm_out = _norm(widths[0], groups)
        self.conv_out = nn.Conv2d(widths[0], config.out_ch, 3, padding=1)

    def forward(self, z_BChw: Tensor) -> Tensor:
        """Decode; values are not clamped."""
        x_BChw = self.mid(self.conv_in(z_BChw))
        for level in reversed(self.up):
            x_BChw = level(x_BChw)
        return self.conv_out(F.silu(self.norm_out(x_BChw)))


class Autoencoder(nn.Module):
    """The pair, with the scale and shift between the posterior z and the latents the transformer works on."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def moments(self, x_BChw: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log-variance of the posterior of z, each (B, C, h / 8, w / 8), before scale and shift."""
        mean, log_variance = self.encoder(x_BChw).chunk(2, dim=1)
        return mean, log_variance

    def encode(self, x_BChw: Tensor, *, generator: Generator | None = None) -> Tensor:
        """Encode pixels in [-1, 1] to latents scale_factor * (z - shift_factor), (B, C, h / 8, w / 8).

        z is the posterior's mean; a sample of the posterior if a generator is given. The noise is drawn where the
        generator lives, so a CPU generator gives the same latents on every device.
        """
        z, log_variance = self.moments(x_BChw)
        if generator is not None:
            noise = torch.randn(z.shape, generator=generator, device=generator.device).to(z)
            z = z + torch.exp(0.5 * log_variance) * noise
        return self.config.scale_factor * (z - self.config.shift_factor)

    def decode(self, z_BChw: Tensor) -> Tensor:
        """Decode latents to pixels (B, 3, 8 h, 8 w), about [-1, 1] and not clamped."""
        return self.decoder(z_BChw / self.config.scale_factor + self.config.shift_factor)
