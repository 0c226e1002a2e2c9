"""Cached samples: latents of both modalities and text features, as safetensors, and what made them.

A sample is a safetensors file of its own or a member of a tar shard (`dataset.shards`); its bytes are the same. Its
header holds the stamp of the cache it was made for: samples of two caches can't be mixed up unnoticed.

Shape suffixes: B captions, L tokens, D width, C channels, h w latent rows and columns.
"""

import json
import logging
import os
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from library.errors import UserError
from library.files import save_tensors, write_atomically, write_json
from library.flux.text import TextFeatures
from library.loading import BadSample

log = logging.getLogger(__name__)

FORMAT = 2  # raise when the files' content changes its meaning

# Of what made a cache (meta.json): what decides the text features, and must be the same in all that are used together.
TEXT_KEYS = ("clip_l", "clip_activation", "t5xxl", "t5_length", "text_mask")
UNKNOWN = "unknown"  # in place of a model's fingerprint, where nobody knows which one made an imported cache

_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}  # of cached tensors, as safetensors names them
_REMEDY = "run the preprocessing step again, it makes only what is missing"


@dataclass(frozen=True, kw_only=True, slots=True)
class CachedPair:
    """One sample: latents (C, h, w), scaled as the transformer reads them, and its captions with their features.

    `text` has B = the number of captions; None where the features were left out. `captions` may be empty where there
    are features.
    """

    rgb_Chw: Tensor
    depth_Chw: Tensor
    text: TextFeatures | None
    captions: tuple[str, ...] = ()


def text_to_tensors(text: TextFeatures, *, dtype: torch.dtype) -> dict[str, Tensor]:
    """Name features as the files do: clip (B, D), t5 (B, L, D), t5_mask (B, L), txt_ids (B, L, 3).

    Without the axis B if it is 1.
    """
    tensors = {"clip": text.pooled_BD.to(dtype), "t5": text.tokens_BLD.to(dtype)}
    if text.mask_BL is not None:
        tensors["t5_mask"] = text.mask_BL.to(torch.bool)
    if text.ids_BL3 is not None:
        tensors["txt_ids"] = text.ids_BL3.float()
    return {name: tensor[0] if len(tensor) == 1 else tensor for name, tensor in tensors.items()}


def text_from_tensors(tensors: dict[str, Tensor]) -> TextFeatures:
    """Undo `text_to_tensors`; floats keep the precision of the files."""
    one = tensors["clip"].ndim == 1
    batched = {name: tensors[name][None] if one else tensors[name] for name in tensors}
    return TextFeatures(
        tokens_BLD=batched["t5"],
        pooled_BD=batched["clip"],
        mask_BL=batched.get("t5_mask"),
        ids_BL3=batched.get("txt_ids"),
    )


# ---- one sample --------------------------------------------------------------------------------------------------


def pair_to_bytes(pair: CachedPair, *, dtype: torch.dtype, stamp: str) -> bytes:
    """Make a sample's file content, its floats in `dtype`; equal pairs give equal bytes."""
    tensors = {"image_latent": pair.rgb_Chw.to(dtype), "depth_latent": pair.depth_Chw.to(dtype)}
    if pair.captions:
        tensors["captions"] = torch.tensor(list("\n".join(pair.captions).encode()), dtype=torch.uint8)
    if pair.text is not None:
        tensors |= text_to_tensors(pair.text, dtype=dtype)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return safetensors.torch.save(tensors, metadata={"jointdit": json.dumps({"stamp": stamp})})


def pair_from_bytes(content: Tensor, *, where: str, stamp: str) -> CachedPair:
    """Undo `pair_to_bytes` without copying; `where` tells a person what is read, `stamp` is that of the cache.

    Raises:
        BadSample: it is damaged or no cached sample.
        UserError: it was made by other models or settings than the rest of the cache.
    """
    try:
        tensors, metadata = _views(content)
        found = json.loads(metadata.get("jointdit", "{}")).get("stamp")
        captions = bytes(tensors["captions"].numpy()).decode() if "captions" in tensors else ""
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RuntimeError) as error:
        raise BadSample(f"{where}: damaged ({error}); delete it and {_REMEDY}") from None
    needed = ("image_latent", "depth_latent", *(("clip", "t5") if "t5" in tensors or not captions else ()))
    for name in needed:
        if name not in tensors:
            raise BadSample(f"{where}: holds no {name}; delete it and {_REMEDY}")
    if found != stamp:
        raise UserError(
            f"{where}: was made by other models or settings than this cache's meta.json says; delete it and {_REMEDY}"
        )
    return CachedPair(
        rgb_Chw=tensors["image_latent"],
        depth_Chw=tensors["depth_latent"],
        text=text_from_tensors(tensors) if "t5" in tensors else None,
        captions=tuple(captions.split("\n")) if captions else (),
    )


def _views(content: Tensor) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Views of the tensors in a safetensors file's bytes, and its metadata: the library's own loaders copy twice."""
    start = 8 + int.from_bytes(content[:8].numpy().tobytes(), "little")
    header = json.loads(content[8:start].numpy().tobytes())
    metadata = header.pop("__metadata__", {})
    tensors = {}
    for name, entry in header.items():
        low, high = (start + offset for offset in entry["data_offsets"])
        if high > len(content):
            raise ValueError(f"{len(content)} of {high} bytes are there")
        tensors[name] = content[low:high].view(_DTYPES[entry["dtype"]]).view(entry["shape"])
    return tensors, metadata


def read_content(path: Path, *, where: str, offset: int = 0, length: int | None = None) -> Tensor:
    """Read a file, or so many of its bytes, as uint8.

    Raises:
        BadSample: it is missing, too short or can't be read.
    """
    try:
        with path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size if length is None else length
            if hasattr(os, "posix_fadvise"):  # the disk gets one order for all of it
                os.posix_fadvise(file.fileno(), offset, size, os.POSIX_FADV_WILLNEED)
            content = torch.empty(size, dtype=torch.uint8)
            file.seek(offset)
            read = file.readinto(content.numpy().data)
    except FileNotFoundError:
        raise BadSample(f"{where}: no such file; {_REMEDY}") from None
    except OSError as error:
        raise BadSample(f"{where}: can't be read ({error}); {_REMEDY}") from None
    if read != size:
        raise BadSample(f"{where}: cut short ({read} of {size} bytes); delete it and {_REMEDY}")
    return content


def write_pair(path: Path, pair: CachedPair, *, dtype: torch.dtype, stamp: str) -> None:
    """Write one cached sample as a file of its own, atomically."""
    with write_atomically(path) as temporary:
        temporary.write_bytes(pair_to_bytes(pair, dtype=dtype, stamp=stamp))


def read_pair(path: Path, *, stamp: str, flag: str = "--image_folder") -> CachedPair:
    """Read one cached sample from a file of its own.

    Raises:
        BadSample: the file is missing, damaged or no cached sample.
        UserError: it was made by other models or settings than the rest of the cache.
    """
    where = f"{flag} {path}"
    return pair_from_bytes(read_content(path, where=where), where=where, stamp=stamp)


def latent_size(path: Path) -> tuple[int, int]:
    """Rows and columns of a cached sample's latents, from its header alone; (0, 0) where that can't be read."""
    try:
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        _, height, width = header["image_latent"]["shape"]
        return int(height), int(width)
    except (OSError, ValueError, KeyError, TypeError, OverflowError, MemoryError):
        return 0, 0


# ---- features of prompts -----------------------------------------------------------------------------------------


def write_text_features(path: Path, text: TextFeatures, *, dtype: torch.dtype) -> None:
    """Write one prompt's features atomically."""
    save_tensors(path, text_to_tensors(text, dtype=dtype))


def read_text_features(path: Path, *, flag: str) -> TextFeatures:
    """Read one prompt's features as float32.

    Raises:
        UserError: the file is missing, damaged or holds something else.
    """
    try:
        tensors = safetensors.torch.load_file(path)
    except FileNotFoundError:
        raise UserError(f"{flag} {path}: no such file; {_REMEDY}") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{flag} {path}: damaged ({error}); delete it and {_REMEDY}") from None
    for name in ("clip", "t5"):
        if name not in tensors:
            raise UserError(f"{flag} {path}: holds no {name}; delete it and {_REMEDY}")
    return text_from_tensors(tensors).to(dtype=torch.float32)


# ---- what made a cache -------------------------------------------------------------------------------------------


def stamp_of(meta: dict[str, Any]) -> str:
    """Hash what made a cache (the content of its meta.json) into the stamp that each of its samples carries."""
    return sha256(json.dumps({"format": FORMAT, **meta}, sort_keys=True).encode()).hexdigest()[:16]


def read_meta(path: Path, *, flag: str) -> dict[str, Any] | None:
    """Read what made a cache; None where there is no such file.

    Raises:
        UserError: the file is no JSON object, or of another format.
    """
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{flag} {path}: can't be read ({error}); delete the cache folder and make it anew") from None
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise UserError(f"{flag} {path}: not a cache of this version; delete the cache folder and make it anew")
    return meta


def claim_folder(path: Path, made_by: dict[str, Any], *, flag: str) -> str:
    """Write what makes this cache, or check that an earlier run was made by the same; return the samples' stamp.

    Raises:
        UserError: the folder's cache was made by other models or settings; the first difference is named.
    """
    wanted = {"format": FORMAT, **made_by}
    found = read_meta(path, flag=flag)
    if found is None:
        write_json(path, wanted)
        return stamp_of(wanted)
    for key in sorted(wanted.keys() | found.keys()):
        if wanted.get(key) != found.get(key):
            raise UserError(
                f"{flag} {path.parent}: was made with {key} {found.get(key)}, now it is {wanted.get(key)}; "
                "a cache can't be a mix: delete this folder, or use the same models and settings"
            )
    return stamp_of(wanted)
