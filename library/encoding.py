"""Pixels and prompts -> latents and text features: the same for the cache and for training on the fly.

Shape suffixes: B batch, C channels, h w rows and columns (pixels outside, latents inside).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from library.batches import Batch, LatentBatch, PixelBatch
from library.flux.autoencoder import Autoencoder
from library.flux.text import TextEncoders, TextFeatures
from library.randomness import generator_for


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptEncoder:
    """The text encoders, and whether T5's padding is masked and text positions are told."""

    encoders: TextEncoders
    with_mask: bool = False
    with_ids: bool = False

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        """Both text encoders."""
        return self.encoders.clip, self.encoders.t5

    @property
    def precision(self) -> torch.dtype:
        """What the text encoders compute in."""
        return self.encoders.t5.dtype

    def encode(self, prompts: Sequence[str]) -> TextFeatures:
        """Encode prompts to float32 features."""
        features = self.encoders.encode(list(prompts), with_mask=self.with_mask, with_ids=self.with_ids)
        return features.to(dtype=torch.float32)

    def complete(self, latents: LatentBatch) -> Batch:
        """Add the features of the prompts to cached latents."""
        return Batch(
            rgb_BChw=latents.rgb_BChw,
            depth_BChw=latents.depth_BChw,
            text=self.encode(latents.prompts),
            names=latents.names,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentEncoder:
    """The autoencoder, and what is taken of its posterior: "mean", or a "sample" drawn from seed and name."""

    autoencoder: Autoencoder
    posterior: str = "sample"
    seed: int = 0

    @torch.no_grad()
    def encode(self, pixels_BChw: Tensor, *, names: Sequence[str], modality: str) -> Tensor:
        """Encode pixels in [-1, 1] to scaled latents (B, 16, h / 8, w / 8), float32.

        Sample by sample, so that the result doesn't depend on what else is in the batch.
        """
        parameter = next(self.autoencoder.parameters())
        encoded = []
        for x_Chw, name in zip(pixels_BChw.to(parameter), names, strict=True):
            noise = generator_for(self.seed, "posterior", modality, name) if self.posterior == "sample" else None
            encoded.append(self.autoencoder.encode(x_Chw[None], generator=noise))
        return torch.cat(encoded).float()


@dataclass(frozen=True, kw_only=True, slots=True)
class PairEncoder:
    """Encodes whole batches."""

    latents: LatentEncoder
    prompts: PromptEncoder

    def encode(self, pixels: PixelBatch) -> Batch:
        """Pixels and prompts -> what the loss takes, each part on the device of the network that made it."""
        return Batch(
            rgb_BChw=self.latents.encode(pixels.rgb_BChw, names=pixels.names, modality="rgb"),
            depth_BChw=self.latents.encode(pixels.depth_BChw, names=pixels.names, modality="depth"),
            text=self.prompts.encode(pixels.prompts),
            names=pixels.names,
        )
