"""What a training batch carries, as pixels and as latents.

Shape suffixes: B batch, C channels, h w rows and columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from library.errors import UserError
from library.flux.text import TextFeatures, text_ids


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Pairs ready for the loss: scaled latents of both modalities and the features of the prompts.

    Floats have the precision they were cached in, which halves what goes between processes, until `to`.
    """

    rgb_BChw: Tensor
    depth_BChw: Tensor
    text: TextFeatures
    names: tuple[str, ...]

    def to(self, device: torch.device | str) -> "Batch":
        """Move all tensors to `device`, as float32."""
        return replace(
            self,
            rgb_BChw=self.rgb_BChw.to(device, non_blocking=True).float(),
            depth_BChw=self.depth_BChw.to(device, non_blocking=True).float(),
            text=self.text.to(device).to(dtype=torch.float32),
        )

    def pin_memory(self) -> "Batch":
        """Pin all tensors, for a GPU that is to fetch them meanwhile."""
        pinned = {name: value.pin_memory() for name, value in text_tensors(self.text).items()}
        return replace(
            self,
            rgb_BChw=self.rgb_BChw.pin_memory(),
            depth_BChw=self.depth_BChw.pin_memory(),
            text=replace(self.text, **pinned),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class RawBatch:
    """Pairs of which encoders make a `Batch`: both modalities, and the prompts as they are."""

    rgb_BChw: Tensor
    depth_BChw: Tensor
    prompts: tuple[str, ...]
    names: tuple[str, ...]

    def pin_memory(self) -> Self:
        """Pin all tensors."""
        return replace(self, rgb_BChw=self.rgb_BChw.pin_memory(), depth_BChw=self.depth_BChw.pin_memory())


class PixelBatch(RawBatch):
    """Pairs before the encoders: pixels of both modalities in [-1, 1], three channels each, and the prompts."""

    __slots__ = ()


class LatentBatch(RawBatch):
    """Pairs whose latents are cached but not their text: scaled latents of both modalities, and the prompts."""

    __slots__ = ()


def text_tensors(text: TextFeatures) -> dict[str, Tensor]:
    """List the tensors that are there, by field name."""
    fields = ("tokens_BLD", "pooled_BD", "mask_BL", "ids_BL3")
    return {name: getattr(text, name) for name in fields if getattr(text, name) is not None}


def concatenate_text(texts: Sequence[TextFeatures]) -> TextFeatures:
    """Join features along the batch axis; all have the same fields and token count."""
    return TextFeatures(
        **{name: torch.cat([text_tensors(text)[name] for text in texts]) for name in text_tensors(texts[0])}
    )


def text_rows(text: TextFeatures, rows: slice) -> TextFeatures:
    """Pick samples of the batch axis."""
    return TextFeatures(**{name: value[rows] for name, value in text_tensors(text).items()})


def number_text(text: TextFeatures) -> TextFeatures:
    """Add the text positions (position, 0, 0), which Flux leaves at zero."""
    batch, length, _ = text.tokens_BLD.shape
    return replace(text, ids_BL3=text_ids(batch, length).to(text.tokens_BLD.device))


def stack_same_size(tensors: Sequence[Tensor], names: Sequence[str], *, what: str) -> Tensor:
    """Stack tensors of one shape along a new first axis.

    Raises:
        UserError: two samples differ in size; both are named.
    """
    for tensor, name in zip(tensors, names, strict=True):
        if tensor.shape != tensors[0].shape:
            first, other = tuple(tensors[0].shape), tuple(tensor.shape)
            raise UserError(
                f"--image_folder: {what} of {names[0]} has shape {first} but that of {name} has {other}; "
                "a batch needs one size"
            )
    return torch.stack(list(tensors))


def drop_text(text: TextFeatures, *, empty: TextFeatures, drop_B: Tensor) -> TextFeatures:
    """Replace the features of the samples where `drop_B` is true by those of the empty prompt.

    `empty` has batch size 1 and the same token count.
    """
    if not bool(drop_B.any()):
        return text
    blank = text_tensors(empty)
    mixed = {}
    for name, value in text_tensors(text).items():
        choose = drop_B.to(value.device).view(-1, *[1] * (value.ndim - 1))
        mixed[name] = torch.where(choose, blank[name].to(value.device, value.dtype), value)
    return replace(text, **mixed)


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptFeatures:
    """Features of the empty prompt (B = 1) and of the evaluation prompts (B = their number; None if there are none)."""

    empty: TextFeatures
    prompts: tuple[str, ...] = ()
    evaluation: TextFeatures | None = None
