"""Captions as token ids and pictures as packed latents, all in memory.

Shape suffixes: N samples, B batch, L tokens, D width, C cells in a token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from cache_latents import cache_latents, read_names
from object_cells import pack_cells
from safetensors.torch import load_file
from torch import Generator, Tensor
from train_tokenizers import read_captions
from transformers import PreTrainedTokenizerBase

from library.errors import UserError
from library.flux.latents import pack
from library.flux.text import EMPTY_PROMPT


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """What one step reads: clean packed latents of pictures and depth maps, codes of objects, ids of captions."""

    x_BLD: Tensor
    depth_BLD: Tensor
    object_BLC: Tensor
    clip_ids_BL: Tensor
    t5_ids_BL: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Samples:
    """A data set in memory, and the ids of the empty prompt (1, L)."""

    x_NLD: Tensor
    depth_NLD: Tensor
    object_NLC: Tensor
    clip_ids_NL: Tensor
    t5_ids_NL: Tensor
    empty_clip_1L: Tensor
    empty_t5_1L: Tensor

    def __len__(self) -> int:
        return len(self.x_NLD)

    def __getitem__(self, which: slice) -> "Samples":
        return Samples(
            x_NLD=self.x_NLD[which],
            depth_NLD=self.depth_NLD[which],
            object_NLC=self.object_NLC[which],
            clip_ids_NL=self.clip_ids_NL[which],
            t5_ids_NL=self.t5_ids_NL[which],
            empty_clip_1L=self.empty_clip_1L,
            empty_t5_1L=self.empty_t5_1L,
        )

    def all(self) -> Batch:
        """Return the whole set with its own captions."""
        return Batch(
            x_BLD=self.x_NLD,
            depth_BLD=self.depth_NLD,
            object_BLC=self.object_NLC,
            clip_ids_BL=self.clip_ids_NL.long(),
            t5_ids_BL=self.t5_ids_NL.long(),
        )

    def draw(self, count: int, *, text_dropout: float, generator: Generator) -> Batch:
        """Draw samples with replacement; a share of the captions gives way to the empty prompt."""
        index = torch.randint(len(self), (count,), generator=generator)
        dropped_B1 = torch.rand(count, 1, generator=generator) < text_dropout
        return Batch(
            x_BLD=self.x_NLD[index],
            depth_BLD=self.depth_NLD[index],
            object_BLC=self.object_NLC[index],
            clip_ids_BL=torch.where(dropped_B1, self.empty_clip_1L, self.clip_ids_NL[index]).long(),
            t5_ids_BL=torch.where(dropped_B1, self.empty_t5_1L, self.t5_ids_NL[index]).long(),
        )


def load_samples(
    scenes: Path,
    *,
    latents: Path,
    ae: Path,
    clip_tokenizer: PreTrainedTokenizerBase,
    t5_tokenizer: PreTrainedTokenizerBase,
    limit: int | None,
) -> Samples:
    """Read captions and latents; latents that aren't there yet are made with the autoencoder and kept."""
    captions = read_captions(scenes, limit=limit)
    if not latents.exists():
        cache_latents(scenes, ae=ae, output=latents)
    kept = load_file(latents)
    if not {"rgb", "depth", "objects"} <= kept.keys():
        made = "not a file of this version's scripts/tiny/cache_latents.py (keys rgb, depth and objects)"
        raise UserError(f"--latents {latents}: {made}; make it anew")
    names = read_names(latents)
    count = min(len(names), len(captions))
    if names[:count] != list(captions)[:count] or (limit is None and len(names) != len(captions)):
        raise UserError(f"--latents {latents}: of other scenes than --scenes {scenes} has captions of; make it anew")
    texts = list(captions.values())[:count]
    clip_ids = [_ids(clip_tokenizer, each) for each in (texts, [EMPTY_PROMPT])]
    t5_ids = [_ids(t5_tokenizer, each) for each in (texts, [EMPTY_PROMPT])]
    # CLIP is causal and pools at its end token, so positions that no caption reaches can be left away
    longest = int((clip_ids[0] != clip_tokenizer.pad_token_id).sum(dim=1).max()) + 1
    return Samples(
        x_NLD=pack(kept["rgb"][:count]).to(torch.bfloat16),
        depth_NLD=pack(kept["depth"][:count]).to(torch.bfloat16),
        object_NLC=pack_cells(kept["objects"][:count]),
        clip_ids_NL=clip_ids[0][:, :longest],
        t5_ids_NL=t5_ids[0],
        empty_clip_1L=clip_ids[1][:, :longest],
        empty_t5_1L=t5_ids[1],
    )


def _ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Tensor:
    encoded = tokenizer(
        list(texts), max_length=tokenizer.model_max_length, padding="max_length", truncation=True, return_tensors="pt"
    )
    return encoded.input_ids.to(torch.int16)
