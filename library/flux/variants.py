"""The backbones this project knows: one row of `VARIANTS` each."""

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True, slots=True)
class FluxConfig:
    """Sizes of the FLUX.1 transformer; the defaults are FLUX.1-dev's.

    `axes_dim` are the rotary widths of (text order, row, column): each even, together the width of a head.
    """

    in_channels: int = 64
    vec_in_dim: int = 768
    context_in_dim: int = 4096
    hidden_size: int = 3072
    mlp_ratio: float = 4.0
    num_heads: int = 24
    depth: int = 19
    depth_single_blocks: int = 38
    axes_dim: tuple[int, ...] = (16, 56, 56)
    theta: int = 10_000
    qkv_bias: bool = True
    guidance_embed: bool = True

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")
        if sum(self.axes_dim) != self.head_width or any(width % 2 for width in self.axes_dim):
            raise ValueError(
                f"axes_dim {self.axes_dim}: even widths that sum to the head width {self.head_width} are needed"
            )

    @property
    def head_width(self) -> int:
        """Width K of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def mlp_width(self) -> int:
        """Width of the hidden layer of the feed-forward networks."""
        return int(self.hidden_size * self.mlp_ratio)


@dataclass(frozen=True, kw_only=True, slots=True)
class AutoencoderConfig:
    """Sizes of the FLUX.1 autoencoder; latent = scale_factor * (z - shift_factor), one latent for 8 x 8 pixels."""

    resolution: int = 256
    in_channels: int = 3
    ch: int = 128
    out_ch: int = 3
    ch_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    z_channels: int = 16
    scale_factor: float = 0.3611
    shift_factor: float = 0.1159
    num_groups: int = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """One backbone: its sizes, how it likes to be sampled, and where its weights are published."""

    name: str
    flux: FluxConfig = field(default_factory=FluxConfig)
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    t5_length: int = 512
    steps: int = 20
    shift_schedule: bool = True
    size: int = 512
    hub: str | None = None


_TINY_FLUX = FluxConfig(
    vec_in_dim=64,
    context_in_dim=128,
    hidden_size=192,
    num_heads=3,
    depth=2,
    depth_single_blocks=6,
    axes_dim=(8, 28, 28),
)
_TINY_AUTOENCODER = AutoencoderConfig(ch=16, num_res_blocks=1, num_groups=1)

VARIANTS: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        Variant(name="dev", hub="black-forest-labs/FLUX.1-dev"),
        Variant(
            name="schnell",
            flux=FluxConfig(guidance_embed=False),
            t5_length=256,
            steps=4,
            shift_schedule=False,
            hub="black-forest-labs/FLUX.1-schnell",
        ),
        Variant(name="krea-dev", hub="black-forest-labs/FLUX.1-Krea-dev"),
        Variant(name="tiny", flux=_TINY_FLUX, autoencoder=_TINY_AUTOENCODER, t5_length=40, size=128),
    )
}
