"""JointDiT: one backbone for two modalities, each at a noise level of its own.

Shape suffixes: M modality (RGB, depth), B batch, L tokens, D width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from library.flux.model import Flux, key_mask
from library.flux.text import TextFeatures
from library.flux.variants import FluxConfig
from library.jointdit.attention import CONNECTION_NAMES, WEIGHTINGS, JointAttention, add_connection
from library.jointdit.lora import LoRALinear, add_branch
from library.modality import MODALITIES


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraRanks:
    """Ranks of the low-rank branches; the defaults are those of the released add-ons."""

    blocks: int = 64
    vector_in: int = 512
    vector_out: int = 1024
    text_in: int = 1024

    def __post_init__(self) -> None:
        if min(self.blocks, self.vector_in, self.vector_out, self.text_in) < 1:
            raise ValueError(f"ranks must be at least 1: {self}")


BLOCK_LINEARS = {
    "double_blocks": ("img_mod.lin", "txt_mod.lin", "img_attn.qkv", "txt_attn.qkv", "img_attn.proj", "txt_attn.proj"),
    "single_blocks": ("linear1", "modulation.lin"),
}
"""The linear layers of a block that get a low-rank branch, and no others."""


class JointDiT(Flux):
    """FLUX.1 over a modality axis: frozen backbone, low-rank branches for depth, a joint connection in every block."""

    def __init__(self, config: FluxConfig, *, ranks: LoraRanks, weighting: str = "released"):
        super().__init__(config)
        self.ranks = ranks
        self.weighting = weighting
        add_branch(self, "vector_in.in_layer", rank=ranks.vector_in)
        add_branch(self, "vector_in.out_layer", rank=ranks.vector_out)
        add_branch(self, "txt_in", rank=ranks.text_in)
        for blocks, names in BLOCK_LINEARS.items():
            for block in self.get_submodule(blocks).children():
                for name in names:
                    add_branch(block, name, rank=ranks.blocks)
                add_connection(block, CONNECTION_NAMES[blocks], width=config.hidden_size, modalities=len(MODALITIES))

    def forward(  # type: ignore[override]
        self,
        x_MBLD: Tensor,
        *,
        t_MB: Tensor,
        text: TextFeatures,
        image_ids: Tensor,
        guidance_B: Tensor | None = None,
    ) -> Tensor:
        """Predict both modalities' velocities, RGB first.

        Args:
            x_MBLD: packed noisy latents (2, B, L, 64).
            t_MB: noise levels in [0, 1], 1 is pure noise, (2, B).
            text: features (B, ...), or (2, B, ...) for a text of each modality's own.
            image_ids: positions (L, 3), the same for both modalities.
            guidance_B: guidance scale (B,) or (2, B); needed by guidance-distilled backbones, ignored by others.

        Returns:
            Velocities, the shape of `x_MBLD`.

        Raises:
            ValueError: not two modalities, not a level for each, or no guidance where the backbone needs it.
        """
        if x_MBLD.dim() != 4 or len(x_MBLD) != len(MODALITIES):
            raise ValueError(
                f"x must be (modalities = {len(MODALITIES)}, batch, tokens, width), not {tuple(x_MBLD.shape)}"
            )
        if t_MB.shape != x_MBLD.shape[:2]:
            raise ValueError(f"t_MB must be {tuple(x_MBLD.shape[:2])}, a level for each, not {tuple(t_MB.shape)}")
        mask_MBL = key_mask(text.expand(x_MBLD.shape[:2]), image_tokens=x_MBLD.shape[2])
        attention = JointAttention(weight_MB=WEIGHTINGS[self.weighting](t_MB), mask_MBL=mask_MBL, kernel=self.kernel)
        return super().forward(
            x_MBLD, t_B=t_MB, text=text, image_ids=image_ids, guidance_B=guidance_B, attention=attention
        )

    def trainable_names(self) -> list[str]:
        """Names of what JointDiT adds: the low-rank branches and the joint connections, in the model's order."""
        modules = dict(self.named_modules())
        connections = set(CONNECTION_NAMES.values())
        names = []
        for name, _ in self.named_parameters():
            *owner, leaf = name.split(".")
            branch = owner[-1] in ("lora_A", "lora_B") and isinstance(modules[".".join(owner[:-1])], LoRALinear)
            if branch or owner[-1] in connections:
                names.append(name)
        return names

    @torch.no_grad()
    def reset_addons(self, generator: torch.Generator) -> None:
        """Start what JointDiT adds afresh: with it the model is two passes of the plain backbone."""
        for name, module in self.named_modules():
            if isinstance(module, LoRALinear):
                module.reset_branch(generator)
            elif name.rpartition(".")[2] in CONNECTION_NAMES.values() and isinstance(module, nn.Linear):
                nn.init.zeros_(module.weight)
                nn.init.zeros_(module.bias)
