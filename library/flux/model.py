"""The FLUX.1 transformer: a velocity from noisy tokens, their noise level and a text.

Shape suffixes: B batch, L tokens, D width; any leading axes may stand in place of B.
"""

import torch
from torch import Tensor, nn

from library.flux.attention import Attention, Kernel, SelfAttention, sdpa
from library.flux.layers import (
    TIME_CHANNELS,
    DoubleStreamBlock,
    LastLayer,
    MLPEmbedder,
    SingleStreamBlock,
    rotary_table,
    sinusoidal_embedding,
)
from library.flux.text import TextFeatures
from library.flux.variants import FluxConfig


class Flux(nn.Module):
    """FLUX.1 as published by Black Forest Labs, parameter names included."""

    def __init__(self, config: FluxConfig):
        super().__init__()
        self.config = config
        self.kernel: Kernel = sdpa
        width = config.hidden_size
        self.img_in = nn.Linear(config.in_channels, width)
        self.time_in = MLPEmbedder(TIME_CHANNELS, width)
        self.vector_in = MLPEmbedder(config.vec_in_dim, width)
        self.guidance_in = MLPEmbedder(TIME_CHANNELS, width) if config.guidance_embed else None
        self.txt_in = nn.Linear(config.context_in_dim, width)
        self.double_blocks = nn.ModuleList(DoubleStreamBlock(config) for _ in range(config.depth))
        self.single_blocks = nn.ModuleList(SingleStreamBlock(config) for _ in range(config.depth_single_blocks))
        self.final_layer = LastLayer(width, config.in_channels)

    def forward(
        self,
        x_BLD: Tensor,
        *,
        t_B: Tensor,
        text: TextFeatures,
        image_ids: Tensor,
        guidance_B: Tensor | None = None,
        attention: Attention | None = None,
    ) -> Tensor:
        """Predict v = noise - x_0 for tokens `x_BLD` at noise level `t_B`.

        Args:
            x_BLD: packed noisy latents (..., L, in_channels).
            t_B: noise levels in [0, 1], 1 is pure noise, (...).
            text: features whose leading axes broadcast against those of `x_BLD`.
            image_ids: positions (L, 3) of the image tokens.
            guidance_B: guidance scale, broadcast against `t_B`: needed by distilled backbones, ignored by others.
            attention: what the blocks call; None is plain self-attention with the text's mask.

        Returns:
            Velocities, the shape of `x_BLD`.

        Raises:
            ValueError: the backbone is guidance-distilled and no guidance is given.
        """
        leading = x_BLD.shape[:-2]
        text = text.expand(leading)
        if attention is None:
            attention = SelfAttention(mask_BL=key_mask(text, image_tokens=x_BLD.shape[-2]), kernel=self.kernel)
        vec_BD = self.embed_condition(t_B.expand(leading), pooled_BD=text.pooled_BD, guidance_B=guidance_B)
        rotary = self.rotary(text, image_ids=image_ids)

        img_BLD = self.img_in(x_BLD)
        txt_BLD = self.txt_in(text.tokens_BLD)
        for block in self.double_blocks:
            img_BLD, txt_BLD = block(img_BLD, txt_BLD, vec_BD=vec_BD, rotary=rotary, attention=attention)
        joined_BLD = torch.cat([txt_BLD, img_BLD], dim=-2)
        for block in self.single_blocks:
            joined_BLD = block(joined_BLD, vec_BD=vec_BD, rotary=rotary, attention=attention)
        return self.final_layer(joined_BLD[..., txt_BLD.shape[-2] :, :], vec_BD)

    def embed_condition(self, t_B: Tensor, *, pooled_BD: Tensor, guidance_B: Tensor | None) -> Tensor:
        """Sum of the embedded noise level, guidance and pooled text, (..., D): it modulates every block."""
        dtype = pooled_BD.dtype
        vec_BD = self.time_in(sinusoidal_embedding(t_B).to(dtype))
        if self.guidance_in is not None:
            if guidance_B is None:
                raise ValueError("this backbone is guidance-distilled: guidance_B is needed")
            vec_BD = vec_BD + self.guidance_in(sinusoidal_embedding(guidance_B.expand(t_B.shape)).to(dtype))
        return vec_BD + self.vector_in(pooled_BD)

    def rotary(self, text: TextFeatures, *, image_ids: Tensor) -> Tensor:
        """Rotary table of [text, image]; without text ids all text tokens stand at position 0."""
        if text.ids_BL3 is None:
            text_ids = image_ids.new_zeros(text.tokens_BLD.shape[-2], 3)
        else:
            text_ids = text.ids_BL3
            image_ids = image_ids.expand(*text_ids.shape[:-2], -1, -1)
        ids = torch.cat([text_ids.to(image_ids), image_ids], dim=-2)
        return rotary_table(ids, axes_dim=self.config.axes_dim, theta=self.config.theta)


def key_mask(text: TextFeatures, *, image_tokens: int) -> Tensor | None:
    """Boolean mask (..., L) over [text, image] keys, or None where the text carries no mask: padding attends then."""
    if text.mask_BL is None:
        return None
    mask_BL = text.mask_BL.to(torch.bool)
    return torch.cat([mask_BL, mask_BL.new_ones(*mask_BL.shape[:-1], image_tokens)], dim=-1)
