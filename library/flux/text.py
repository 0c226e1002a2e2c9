"""Text for the backbone: what the two encoders give it, and the encoders themselves.

Shape suffixes: B batch, L tokens, D width.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from library.errors import UserError, first_line
from library.flux.text_weights import load_clip, load_t5

if TYPE_CHECKING:
    from transformers import CLIPTextModel, PreTrainedTokenizerBase, T5EncoderModel

__all__ = ["TextEncoders", "TextFeatures", "load_clip", "load_t5", "load_text_encoders", "text_ids"]

logger = logging.getLogger(__name__)

EMPTY_PROMPT = " "  # one space: what the released model takes for "no prompt"
CLIP_TOKENIZER = "openai/clip-vit-large-patch14"
T5_TOKENIZER = "google/t5-v1_1-xxl"
_TOKENIZER_FILES = ["tokenizer*", "special_tokens_map.json", "vocab.json", "merges.txt", "spiece.model"]
_EOS_BY_HIGHEST_ID = 2  # a CLIP configuration with eos = 2 means "pool at the highest id" (transformers #24773)


@dataclass(frozen=True, slots=True)
class TextFeatures:
    """What the backbone reads of a prompt. Every field may carry leading axes before B (a modality axis, say).

    Attributes:
        tokens_BLD: T5's last hidden states, L = the variant's token length, D = `context_in_dim`.
        pooled_BD: CLIP's pooled vector, D = `vec_in_dim`.
        mask_BL: True where a token is part of the prompt; None means that padding attends too.
        ids_BL3: position ids of the text tokens; None means all zero.
    """

    tokens_BLD: Tensor
    pooled_BD: Tensor
    mask_BL: Tensor | None = None
    ids_BL3: Tensor | None = None

    def expand(self, leading: Sequence[int]) -> TextFeatures:
        """Return views whose axes before L (or D) are broadcast to `leading`, (M, B) say."""
        return TextFeatures(
            tokens_BLD=self.tokens_BLD.expand(*leading, *self.tokens_BLD.shape[-2:]),
            pooled_BD=self.pooled_BD.expand(*leading, self.pooled_BD.shape[-1]),
            mask_BL=None if self.mask_BL is None else self.mask_BL.expand(*leading, self.mask_BL.shape[-1]),
            ids_BL3=None if self.ids_BL3 is None else self.ids_BL3.expand(*leading, *self.ids_BL3.shape[-2:]),
        )

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> TextFeatures:
        """Return the same features on `device`; `dtype` converts the two floating fields only."""
        return TextFeatures(
            tokens_BLD=self.tokens_BLD.to(device=device, dtype=dtype),
            pooled_BD=self.pooled_BD.to(device=device, dtype=dtype),
            mask_BL=None if self.mask_BL is None else self.mask_BL.to(device=device),
            ids_BL3=None if self.ids_BL3 is None else self.ids_BL3.to(device=device),
        )


def text_ids(batch: int, length: int) -> Tensor:
    """Return (B, L, 3) float ids (position, 0, 0): text counts along the axis that is 0 for every image token.

    Flux itself, and so the released add-ons, leave all text ids zero; these are for `--is_txt_ids_training`.
    """
    ids_L3 = torch.zeros(length, 3)
    ids_L3[:, 0] = torch.arange(length)
    return ids_L3.expand(batch, length, 3)


class TextEncoders:
    """CLIP and T5 with their tokenizers: prompts in, `TextFeatures` out."""

    def __init__(
        self,
        *,
        clip: CLIPTextModel,
        t5: T5EncoderModel,
        clip_tokenizer: PreTrainedTokenizerBase,
        t5_tokenizer: PreTrainedTokenizerBase,
        t5_length: int,
    ) -> None:
        self.clip = clip
        self.t5 = t5
        self.clip_tokenizer = clip_tokenizer
        self.t5_tokenizer = t5_tokenizer
        self.t5_length = t5_length
        _require_fit(clip_tokenizer, clip.config, flag="--clip_tokenizer")
        _require_fit(t5_tokenizer, t5.config, flag="--t5_tokenizer")
        if clip_tokenizer.eos_token_id != clip.config.eos_token_id != _EOS_BY_HIGHEST_ID:
            raise UserError(
                f"--clip_tokenizer {clip_tokenizer.name_or_path}: its eos id {clip_tokenizer.eos_token_id} isn't the "
                f"encoder's {clip.config.eos_token_id}, so another token would be pooled; give the encoder's own"
            )

    @property
    def device(self) -> torch.device:
        """Where the encoders are, and so the features."""
        return self.t5.shared.weight.device

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> TextEncoders:
        """Move both encoders in place and return self."""
        for module in (self.clip, self.t5):
            module.to(device=device, dtype=dtype)
        return self

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], *, with_mask: bool = False, with_ids: bool = False) -> TextFeatures:
        """Encode prompts; one that is too long for T5 is cut, with a warning that says by how much.

        Args:
            prompts: B texts; " " (one space) is the empty prompt everywhere.
            with_mask: T5 doesn't attend to padding, and the mask goes along with the features.
            with_ids: text position ids go along (`text_ids`), where Flux has zeros.

        Returns:
            Features in the encoders' dtype and on their device; L = `t5_length`.
        """
        clip_ids_BL = self.clip_token_ids(prompts).to(self.device)
        t5_ids_BL, mask_BL = (tensor.to(self.device) for tensor in self.t5_token_ids(prompts))
        # CLIP is causal and pools at the end-of-text token, so its padding is never seen
        pooled_BD = self.clip(input_ids=clip_ids_BL).pooler_output
        tokens_BLD = self.t5(input_ids=t5_ids_BL, attention_mask=mask_BL if with_mask else None).last_hidden_state
        return TextFeatures(
            tokens_BLD=tokens_BLD,
            pooled_BD=pooled_BD,
            mask_BL=mask_BL if with_mask else None,
            ids_BL3=text_ids(len(prompts), self.t5_length).to(self.device) if with_ids else None,
        )

    def clip_token_ids(self, prompts: Sequence[str]) -> Tensor:
        """Return (B, L) ids, L = CLIP's number of positions; longer prompts are cut (T5 reads them whole)."""
        return self.clip_tokenizer(
            list(prompts),
            max_length=self.clip.config.max_position_embeddings,
            padding="max_length",
            truncation=True,
            return_tensors="pt",
        ).input_ids

    def t5_token_ids(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return (B, L) ids and the boolean mask of those that are no padding, L = `t5_length`."""
        for prompt, ids in zip(prompts, self.t5_tokenizer(list(prompts), verbose=False).input_ids, strict=True):
            if len(ids) > self.t5_length:
                cut = len(ids) - self.t5_length
                logger.warning("prompt cut: the last %d of its %d T5 tokens aren't read: %.60s", cut, len(ids), prompt)
        encoded = self.t5_tokenizer(
            list(prompts), max_length=self.t5_length, padding="max_length", truncation=True, return_tensors="pt"
        )
        return encoded.input_ids, encoded.attention_mask.bool()


def load_text_encoders(
    clip_path: str | Path,
    t5_path: str | Path,
    *,
    clip_tokenizer: str | Path | None = None,
    t5_tokenizer: str | Path | None = None,
    t5_length: int | None = None,
    clip_activation: str = "gelu",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> TextEncoders:
    """Load both encoders and their tokenizers.

    Args:
        clip_path: single file or transformers folder.
        t5_path: single file or transformers folder.
        clip_tokenizer: folder or hub name; by default `tokenizer/` beside the file, else openai/clip-vit-large-patch14.
        t5_tokenizer: folder or hub name; by default `tokenizer_2/` beside the file, else google/t5-v1_1-xxl.
        t5_length: tokens T5 is padded to; by default what the file's JSON says as `token_length`, else 512.
        clip_activation: "gelu" or "quick_gelu", see `load_clip`.
        dtype: of the weights and features.
        device: of the weights and features.

    Raises:
        UserError: naming `--clip_l`, `--t5xxl`, `--clip_tokenizer` or `--t5_tokenizer`.
    """
    clip = load_clip(clip_path, activation=clip_activation, dtype=dtype, device=device)
    t5, stated_length = load_t5(t5_path, dtype=dtype, device=device)
    return TextEncoders(
        clip=clip,
        t5=t5,
        clip_tokenizer=load_clip_tokenizer(clip_tokenizer, beside=clip_path),
        t5_tokenizer=load_t5_tokenizer(t5_tokenizer, beside=t5_path),
        t5_length=t5_length or stated_length,
    )


def load_clip_tokenizer(tokenizer: str | Path | None = None, *, beside: str | Path) -> PreTrainedTokenizerBase:
    """Return CLIP's tokenizer: `tokenizer` if given, else the folder `tokenizer/` beside the file, else the hub's."""
    from transformers import CLIPTokenizer

    files = ("tokenizer.json", "vocab.json")
    source = tokenizer or _folder_beside(Path(beside), "tokenizer", files) or CLIP_TOKENIZER
    return _load_tokenizer(CLIPTokenizer, source, flag="--clip_tokenizer")


def load_t5_tokenizer(tokenizer: str | Path | None = None, *, beside: str | Path) -> PreTrainedTokenizerBase:
    """Return T5's tokenizer: `tokenizer` if given, else the folder `tokenizer_2/` beside the file, else the hub's."""
    from transformers import T5Tokenizer

    files = ("tokenizer.json", "spiece.model")
    source = tokenizer or _folder_beside(Path(beside), "tokenizer_2", files) or T5_TOKENIZER
    return _load_tokenizer(T5Tokenizer, source, flag="--t5_tokenizer")


def _folder_beside(weights: Path, name: str, files: Sequence[str]) -> Path | None:
    """Find a tokenizer's folder: beside a file; inside, beside (diffusers) or mixed with a folder of weights."""
    candidates = [weights / name, weights.parent / name, weights] if weights.is_dir() else [weights.parent / name]
    return next((folder for folder in candidates if any((folder / file).is_file() for file in files)), None)


def _load_tokenizer(kind: Any, source: str | Path, *, flag: str) -> PreTrainedTokenizerBase:
    folder = Path(source)
    if not folder.is_dir():
        folder = _download_tokenizer(str(source), flag=flag)
    try:
        return kind.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # the parsers raise many kinds
        raise UserError(f"{flag} {source}: its files can't be read ({first_line(error)})") from error


def _download_tokenizer(name: str, *, flag: str) -> Path:
    """Return the local folder of a hub repository's tokenizer files, downloaded where they aren't there yet."""
    from huggingface_hub import snapshot_download

    if name.startswith((".", "/")) or name.count("/") != 1:
        raise UserError(f"{flag} {name}: no such folder")
    try:
        return Path(snapshot_download(name, allow_patterns=_TOKENIZER_FILES))
    except Exception as error:  # network, permissions, names: the hub client raises many kinds
        do = "not on this computer and can't be downloaded; give a folder that holds it"
        raise UserError(f"{flag} {name}: {do} ({first_line(error)})") from error


def _require_fit(tokenizer: PreTrainedTokenizerBase, config: Any, *, flag: str) -> None:
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"{flag} {tokenizer.name_or_path}: {len(tokenizer)} tokens, but the encoder's vocabulary has "
            f"{config.vocab_size}; give the encoder's own tokenizer"
        )
