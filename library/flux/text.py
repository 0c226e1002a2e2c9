"""Text for the backbone: what the two encoders give it, and the encoders themselves.

Shape suffixes: B batch, L tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class TextFeatures:
    """What the backbone reads of a prompt. Every field may carry leading axes before B (a modality axis, say).

    Attributes:
        tokens_BLD: T5's last hidden states, L = the variant's token length, D = ``context_in_dim``.
        pooled_BD: CLIP's pooled vector, D = ``vec_in_dim``.
        mask_BL: True (or 1) where a token is part of the prompt; None means that padding attends too.
        ids_BL3: position ids of the text tokens; None means all zero.
    """

    tokens_BLD: Tensor
    pooled_BD: Tensor
    mask_BL: Tensor | None = None
    ids_BL3: Tensor | None = None

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> TextFeatures:
        """Return the same features on ``device``; ``dtype`` converts the two floating fields only."""
        return TextFeatures(
            tokens_BLD=self.tokens_BLD.to(device=device, dtype=dtype),
            pooled_BD=self.pooled_BD.to(device=device, dtype=dtype),
            mask_BL=None if self.mask_BL is None else self.mask_BL.to(device=device),
            ids_BL3=None if self.ids_BL3 is None else self.ids_BL3.to(device=device),
        )
