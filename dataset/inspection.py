"""Looks at the samples of a prepared folder one by one, through the very readers that training uses."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dataset.cache import CachedPair
from dataset.jointdit_dataset import CachedPairs, PictureFiles, PicturePairs, check_size, find_image
from dataset.layout import Layout
from dataset.tally import DIGEST, Tally
from library.batches import text_tensors
from library.errors import UserError
from library.flux.text import load_clip_tokenizer, load_t5_tokenizer
from library.images import read_rgb
from library.loading import BadSample
from library.sizes import PIXELS_PER_TOKEN

# What stops training for the sample it is found in; `--max_bad_samples` of them are skipped.
BAD = {
    "no_depth": "images without a depth map",
    "no_caption": "images without a caption file",
    "image": "images that can't be read",
    "depth": "depth maps that can't be read",
    "depth_nan": "depth maps with NaN",
    "depth_infinite": "depth maps with infinite values",
    "depth_constant": "depth maps of one value everywhere",
    "pair_sizes": "depth maps of another size than their image",
    "small": f"images below {PIXELS_PER_TOKEN} pixels",
    "caption": "captions that aren't UTF-8 text",
    "cached": "cached samples that can't be read",
}
# What stops training as soon as it is met.
FATAL = {
    "overwritten": "files overwritten since the folder was listed",
    "cached_strange": "cached samples made by other models or settings than the rest, or overwritten",
    "cached_nan": "cached samples with NaN or infinite values",
    "cached_shapes": "cached samples whose image and depth latents differ in size",
}
# What is worth a look.
DOUBTS = {
    "blank": "images of one colour",
    "same_image": "images that are copies of another",
    "same_name": "image files whose name another one has, too, with another ending: not used",
    "long_t5": "captions too long for T5: their end isn't read",
    "long_clip": "captions too long for CLIP: their end goes to T5 alone",
    "empty_caption": "captions without text: trained on the empty prompt",
    "lone_depth": "depth maps without an image",
    "lone_caption": "captions without an image",
    "uncached": "images that aren't cached: no part of --is_latent_training",
    "lone_cached": "cached samples without an image",
}

_ALL = 1 << 62  # missing partners are counted here, not refused


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokens:
    """Where the tokenizers are, as `load_clip_tokenizer` and `load_t5_tokenizer` want it, and how much is read."""

    clip: tuple[Path | None, Path]
    t5: tuple[Path | None, Path]
    clip_length: int
    t5_length: int


def inspect_pictures(indices: Sequence[int], *, folder: Path, tokens: Tokens | None) -> Tally:
    """Look at the images, depth maps and captions with these indices."""
    pairs, tally = open_pictures(folder), Tally()
    captions: list[tuple[str, str]] = []
    for index in indices:
        row = pairs.index[index]
        image = find_image(pairs.layout, row.name)
        tally.digests += _content_hash(image)
        if _note_missing(tally, pairs.layout, row.name):
            continue
        try:
            files = pairs.read_files(row.name)
            size = tuple(files.rgb_3hw.shape[-2:])
            check_size(str(image), size, listed=(row.height, row.width), index=pairs.layout.pictures_index)
        except BadSample as error:
            tally.note(_fault_of(pairs.layout, image), row.name, str(error))
            tally.counts["bad"] += 1
            continue
        except UserError as error:
            tally.note("overwritten", row.name, str(error))
            continue
        tally.readable["image"][bucket_of(pairs, index)] += 1
        _measure_pictures(tally, row.name, files)
        captions += [(row.name, caption) for caption in files.captions]
    if tokens is not None:
        _count_tokens(tally, captions, tokens)
    return tally


def inspect_cached(indices: Sequence[int], *, folder: Path, depth_transform: str) -> Tally:
    """Look at the cached samples with these indices."""
    pairs, tally = open_cached(folder, depth_transform), Tally()
    for index in indices:
        name = pairs.names[index]
        try:
            _, pair = pairs.read(index)
        except BadSample as error:
            tally.note("cached", name, str(error))
            tally.counts["bad_cached"] += 1
            continue
        except UserError as error:
            tally.note("cached_strange", name, str(error))
            continue
        tally.readable["cached"][bucket_of(pairs, index)] += 1
        _measure_cached(tally, name, pair)
    return tally


@cache
def open_pictures(folder: Path) -> PicturePairs:
    """Open the pictures of a folder, whatever is missing."""
    return PicturePairs(folder, depth_transform="none", max_bad_samples=_ALL)


@cache
def open_cached(folder: Path, depth_transform: str) -> CachedPairs:
    """Open the cache of a folder."""
    return CachedPairs(folder, depth_transform=depth_transform)


def bucket_of(pairs: PicturePairs | CachedPairs, index: int) -> int:
    """Number of the size by which a sample is put into batches."""
    return int(pairs.buckets[index]) if pairs.buckets is not None else 0


def _content_hash(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            digest = blake2b(digest_size=DIGEST)
            while block := file.read(1 << 20):
                digest.update(block)
            return digest.digest()
    except OSError:  # told of by the reader; no two of them are the same
        return blake2b(str(path).encode(), digest_size=DIGEST, salt=b"unreadable").digest()


def _note_missing(tally: Tally, layout: Layout, name: str) -> bool:
    """Note which partners of an image aren't there; return whether any isn't."""
    missing = [
        (fault, path)
        for fault, path in (("no_depth", layout.depthmap(name)), ("no_caption", layout.prompt(name)))
        if not path.exists()
    ]
    for fault, path in missing:
        tally.note(fault, name, f"{path}: missing")
    tally.counts["bad"] += bool(missing)
    return bool(missing)


_LARGEST = float(np.finfo(np.float32).max)  # what is larger becomes infinite


def _fault_of(layout: Layout, image: Path) -> str:
    """Find out which of a bad sample's files is bad, and how."""
    depthmap = layout.depthmap(image.stem)
    try:
        width, height = read_rgb(image).shape[:0:-1]
    except UserError:
        return "image"
    try:
        values = np.load(depthmap, allow_pickle=False)
        low, high = values.min(), values.max()
    except (ValueError, OSError, EOFError, TypeError):
        return "depth"
    if np.isnan(low):
        return "depth_nan"
    if not -_LARGEST <= low <= high <= _LARGEST:
        return "depth_infinite"
    if low == high:
        return "depth_constant"
    if values.ndim != 2:
        return "depth"
    if values.shape != (height, width):
        return "pair_sizes"
    return "small" if min(width, height) < PIXELS_PER_TOKEN else "caption"


def _measure_pictures(tally: Tally, name: str, files: PictureFiles) -> None:
    darkest_3, lightest_3 = files.rgb_3hw.flatten(1).aminmax(dim=1)
    tally.stretch("image", float(darkest_3.min()), float(lightest_3.max()))
    if torch.equal(darkest_3, lightest_3):
        tally.note("blank", name)
    tally.stretch("disparity", *(float(x) for x in files.disparity_hw.aminmax()))
    tally.measure("image", tuple(files.rgb_3hw.shape[:0:-1]))
    tally.counts["captions"] += len(files.captions)
    words = [len(caption.split()) for caption in files.captions]
    tally.stretch("words", min(words), max(words))
    for caption in files.captions:
        if not caption.strip():
            tally.note("empty_caption", name)


def _count_tokens(tally: Tally, captions: list[tuple[str, str]], tokens: Tokens) -> None:
    if not captions:
        return
    clip, t5 = _tokenizers(tokens)
    texts = [caption for _, caption in captions]
    for kind, tokenizer, most in (("clip", clip, tokens.clip_length), ("t5", t5, tokens.t5_length)):
        lengths = [len(ids) for ids in tokenizer(texts, verbose=False).input_ids]
        tally.stretch(f"{kind}_tokens", min(lengths), max(lengths))
        for (name, _), length in zip(captions, lengths, strict=True):
            if length > most:
                tally.note(f"long_{kind}", name, f"{length} tokens")


@cache
def _tokenizers(tokens: Tokens) -> tuple[Any, Any]:
    return (
        load_clip_tokenizer(tokens.clip[0], beside=tokens.clip[1]),
        load_t5_tokenizer(tokens.t5[0], beside=tokens.t5[1]),
    )


def _measure_cached(tally: Tally, name: str, pair: CachedPair) -> None:
    tensors: dict[str, Tensor] = {"image_latent": pair.rgb_Chw, "depth_latent": pair.depth_Chw}
    if pair.text is not None:
        tensors |= {"t5": pair.text.tokens_BLD, "clip": pair.text.pooled_BD}
        shapes = (tuple(tensor.shape[1:]) for tensor in text_tensors(pair.text).values())
        tally.measure("text", tuple(side for shape in shapes for side in shape))
    for kind, tensor in tensors.items():
        low, high = (float(x) for x in tensor.float().aminmax())
        if not np.isfinite(low + high):
            tally.note("cached_nan", name, kind)
            return
        tally.stretch(kind, low, high)
    if pair.rgb_Chw.shape != pair.depth_Chw.shape:
        tally.note("cached_shapes", name)
    tally.measure("latent", (pair.rgb_Chw.shape[0], *pair.rgb_Chw.shape[:0:-1]))
    tally.counts["features"] += pair.text is not None
