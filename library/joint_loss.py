"""Joint conditional flow matching: what one training sample is, and its loss (JointDiT, section 3).

Shape suffixes: M modality (RGB, depth), B batch, C channels, h w latent rows and columns, L tokens, D token width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from library.batches import Batch
from library.flow import noise_to, velocity
from library.flux.latents import PATCH, image_ids, pack
from library.flux.text import TextFeatures
from library.modality import MODALITIES
from library.randomness import generator_for
from library.timesteps import SAMPLINGS, sample_pair_timesteps

TEXT_DROPOUT = 0.1  # JointDiT, section 4


@dataclass(frozen=True, kw_only=True, slots=True)
class NoiseSettings:
    """What decides the random part of a training sample, beside its step and index."""

    seed: int
    shift: float
    clean_shift: float
    sampling: str = "shift"
    unbalanced: bool = True
    text_dropout: float = TEXT_DROPOUT


@dataclass(frozen=True, kw_only=True, slots=True)
class Draws:
    """Random numbers of one micro-batch: noise, noise levels in (0, 1), and whose text is dropped (boolean)."""

    noise_MBChw: Tensor
    t_MB: Tensor
    drop_B: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class NoisyPairs:
    """What the model sees of a batch and what it shall answer, as tokens; `t_MB` are the noise levels."""

    x_MBLD: Tensor
    target_MBLD: Tensor
    t_MB: Tensor
    image_ids: Tensor


def draw(settings: NoiseSettings, *, step: int, indices: Sequence[int], shape: Sequence[int]) -> Draws:
    """Draw for the samples at `indices` of optimizer step `step`'s global batch; `shape` is that of a latent (C, h, w).

    Every sample has its own generator, seeded by (seed, step, index): the numbers don't depend on how the global batch
    is split among processes and micro-batches.
    """
    generators = [generator_for(settings.seed, "sample", step, index) for index in indices]
    sampling = SAMPLINGS[settings.sampling]
    _, height, width = shape
    t_MB = sample_pair_timesteps(
        len(generators),
        density=sampling.density,
        shift=sampling.shift(settings.shift, (height // PATCH) * (width // PATCH)),
        clean_shift=settings.clean_shift,
        unbalanced=settings.unbalanced,
        generators=generators,
    )
    chance_B = torch.stack([torch.rand((), generator=generator) for generator in generators])
    noise = [torch.randn(len(MODALITIES), *shape, generator=generator) for generator in generators]
    return Draws(noise_MBChw=torch.stack(noise, dim=1), t_MB=t_MB, drop_B=chance_B < settings.text_dropout)


def noisy_pairs(batch: Batch, *, noise_MBChw: Tensor, t_MB: Tensor) -> NoisyPairs:
    """Put noise on a batch: x_t = (1 - t) x_0 + t noise, each modality at its own level; the target is noise - x_0."""
    clean_MBChw = torch.stack([batch.rgb_BChw, batch.depth_BChw])
    t_MB111 = t_MB[..., None, None, None]
    height, width = clean_MBChw.shape[-2:]
    return NoisyPairs(
        x_MBLD=pack(noise_to(clean_MBChw, noise_MBChw, t_MB111)),
        target_MBLD=pack(velocity(clean_MBChw, noise_MBChw)),
        t_MB=t_MB,
        image_ids=image_ids(height // PATCH, width // PATCH, device=clean_MBChw.device),
    )


def predict(model: nn.Module, noisy: NoisyPairs, *, text: TextFeatures, guidance: float) -> Tensor:
    """Return the model's velocities (M, B, L, D) in float32."""
    guidance_B = torch.full(noisy.t_MB.shape[1:], guidance, device=noisy.t_MB.device)
    v_MBLD = model(noisy.x_MBLD, t_MB=noisy.t_MB, text=text, image_ids=noisy.image_ids, guidance_B=guidance_B)
    return v_MBLD.float()


def joint_flow_loss(model: nn.Module, noisy: NoisyPairs, *, text: TextFeatures, guidance: float) -> Tensor:
    """Mean squared error between predicted and true velocities over both modalities, no weighting; a float32 scalar."""
    v_MBLD = predict(model, noisy, text=text, guidance=guidance)
    return torch.nn.functional.mse_loss(v_MBLD, noisy.target_MBLD.float())
