"""How well an autoencoder gives pictures back: PSNR with and without latent noise, hues, and the latents' statistics.

Shapes: B batch, C channels, h w rows and columns.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from pictures import Pictures
from torch import Tensor

from library.evaluation.baselines import PatchStatistics
from library.evaluation.metrics import psnr
from library.flux.autoencoder import Autoencoder
from library.images import colorize, write_rgb
from library.modality import MODALITIES
from library.randomness import generator_for

NOISE = 0.1
HUE_CELL = 8
HUE_CHROMA = 0.15
HUE_TOLERANCE = 15.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Reconstruction:
    """PSNR in dB, the mean over pictures, colours and depth; with 10 % noise; share of hues kept; latent statistics."""

    rgb: float
    depth: float
    hues: float
    rgb_noise: float | None = None
    depth_noise: float | None = None
    latents: str = ""

    def __str__(self) -> str:
        text = f"rgb {self.rgb:.2f} depth {self.depth:.2f} dB hues {self.hues:.3f}"
        if self.rgb_noise is not None:
            text += f" | with noise {self.rgb_noise:.2f} {self.depth_noise:.2f} dB"
        return text + (f" | latents {self.latents}" if self.latents else "")


def mean_psnr(pixels_B3hw: Tensor, target_B3hw: Tensor) -> float:
    """Return the mean PSNR in dB of pictures, whose pixels in [-1, 1] are clamped first."""
    return float(psnr(_unit(pixels_B3hw), _unit(target_B3hw)).mean())


def _unit(pixels_B3hw: Tensor) -> Tensor:
    """Pixels from [-1, 1], clamped, to [0, 1]."""
    return (pixels_B3hw.clamp(-1, 1) + 1) / 2


def _hue_vectors(pixels_B3hw: Tensor) -> Tensor:
    """Return the mean colour of each cell on the plane of hues as complex numbers, length chroma in [0, 1]."""
    r, g, b = F.avg_pool2d(_unit(pixels_B3hw), HUE_CELL).unbind(dim=1)
    return torch.complex(r - (g + b) / 2, 3**0.5 / 2 * (g - b))


def hues_kept(pixels_B3hw: Tensor, target_B3hw: Tensor) -> float:
    """Return the share of coloured cells whose hue moved by less than 15 degrees."""
    before, after = _hue_vectors(target_B3hw), _hue_vectors(pixels_B3hw)
    coloured = before.abs() > HUE_CHROMA
    moved = torch.rad2deg((after * before.conj()).angle()).abs()
    return float((moved[coloured] < HUE_TOLERANCE).float().mean())


@torch.no_grad()
def measure(model: Autoencoder, pictures: Pictures) -> Reconstruction:
    """Measure the round trip of the posterior's mean over all pictures."""
    targets = {"rgb": pictures.rgb(), "depth": pictures.depth()}
    means = {kind: _batched(lambda x: model.moments(x)[0], pixels) for kind, pixels in targets.items()}
    both = torch.cat(list(means.values()))
    generator = generator_for("reconstruction")
    plain = {kind: _batched(model.decoder, mean) for kind, mean in means.items()}
    noisy = {
        kind: _batched(model.decoder, mean + NOISE * both.std() * torch.randn(mean.shape, generator=generator))
        for kind, mean in means.items()
    }
    channels = both.std(dim=(0, 2, 3))
    statistics = ", ".join(f"{kind} mean {mean.mean():.3f} std {mean.std():.3f}" for kind, mean in means.items())
    return Reconstruction(
        rgb=mean_psnr(plain["rgb"], targets["rgb"]),
        depth=mean_psnr(plain["depth"], targets["depth"]),
        hues=hues_kept(plain["rgb"], targets["rgb"]),
        rgb_noise=mean_psnr(noisy["rgb"], targets["rgb"]),
        depth_noise=mean_psnr(noisy["depth"], targets["depth"]),
        latents=f"{statistics}, channels' std {channels.min():.2f} to {channels.max():.2f}",
    )


def _batched(function: Callable[[Tensor], Tensor], x_Bchw: Tensor, size: int = 16) -> Tensor:
    return torch.cat([function(batch) for batch in x_Bchw.split(size)])


def measure_pca(pictures: Pictures, held_out: Pictures) -> Reconstruction:
    """Measure what the best linear code of the same size reaches: PCA of patches, colours and depth together."""
    statistics = PatchStatistics()
    for pixels in (pictures.rgb(), pictures.depth()):
        statistics.add(_unit(pixels))
    pca = statistics.fit()
    targets = {"rgb": held_out.rgb(), "depth": held_out.depth()}
    results = {kind: 2 * pca.reconstruct(_unit(target)) - 1 for kind, target in targets.items()}
    return Reconstruction(
        rgb=mean_psnr(results["rgb"], targets["rgb"]),
        depth=mean_psnr(results["depth"], targets["depth"]),
        hues=hues_kept(results["rgb"], targets["rgb"]),
    )


@torch.no_grad()
def save_sheet(path: Path, model: Autoencoder, pictures: Pictures) -> None:
    """Write a picture with a column per scene: colours, their reconstruction, depth, its reconstruction."""
    rgb, depth = pictures.rgb(), pictures.depth()
    rows = [MODALITIES["rgb"].from_pixels(x) for x in (rgb, model.decode(model.encode(rgb)))]
    for x in (depth, model.decode(model.encode(depth))):
        rows.append(torch.stack([colorize(y) for y in MODALITIES["depth"].from_pixels(x)]))
    write_rgb(path, torch.cat([torch.cat(list(row), dim=-1) for row in rows], dim=-2))
