"""Cached samples: latents of both modalities and text features, one safetensors file a sample, and what made them.

Shape suffixes: B batch, L tokens, D width, C channels, h w latent rows and columns.
"""

import json
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from library.errors import UserError
from library.files import save_tensors, write_json
from library.flux.text import TextFeatures

FORMAT = 1  # raise when the files' content changes its meaning

_SMALL_FILE = 1 << 26  # bytes; hashed whole up to here, sampled beyond
_PIECES, _PIECE = 256, 1 << 16


@dataclass(frozen=True, kw_only=True, slots=True)
class CachedPair:
    """One sample's latents (C, h, w), scaled as the transformer reads them, and its text features with B = 1."""

    rgb_Chw: Tensor
    depth_Chw: Tensor
    text: TextFeatures


def text_to_tensors(text: TextFeatures, *, dtype: torch.dtype) -> dict[str, Tensor]:
    """Name one prompt's features (B = 1) as the files do: clip (D,), t5 (L, D), t5_mask (L,), txt_ids (L, 3)."""
    tensors = {"clip": text.pooled_BD[0].to(dtype), "t5": text.tokens_BLD[0].to(dtype)}
    if text.mask_BL is not None:
        tensors["t5_mask"] = text.mask_BL[0].to(torch.bool)
    if text.ids_BL3 is not None:
        tensors["txt_ids"] = text.ids_BL3[0].float()
    return tensors


def text_from_tensors(tensors: dict[str, Tensor]) -> TextFeatures:
    """Undo `text_to_tensors`; features become float32."""
    optional = {
        field: tensors[name][None]
        for field, name in (("mask_BL", "t5_mask"), ("ids_BL3", "txt_ids"))
        if name in tensors
    }
    return TextFeatures(tokens_BLD=tensors["t5"][None].float(), pooled_BD=tensors["clip"][None].float(), **optional)


def write_pair(path: Path, pair: CachedPair, *, dtype: torch.dtype) -> None:
    """Write one cached sample atomically, its floats in `dtype`."""
    latents = {"image_latent": pair.rgb_Chw.to(dtype), "depth_latent": pair.depth_Chw.to(dtype)}
    save_tensors(path, latents | text_to_tensors(pair.text, dtype=dtype))


def read_pair(path: Path) -> CachedPair:
    """Read one cached sample, floats as float32.

    Raises:
        UserError: the file is missing, damaged or no cached sample.
    """
    tensors = read_tensors(path, needed=("image_latent", "depth_latent", "clip", "t5"), flag="--image_folder")
    return CachedPair(
        rgb_Chw=tensors["image_latent"].float(),
        depth_Chw=tensors["depth_latent"].float(),
        text=text_from_tensors(tensors),
    )


def read_tensors(path: Path, *, needed: tuple[str, ...], flag: str) -> dict[str, Tensor]:
    """Load a safetensors file that must hold the tensors `needed`.

    Raises:
        UserError: the file is missing, damaged or holds something else.
    """
    remedy = "run the preprocessing step again, it makes only what is missing"
    try:
        tensors = load_file(path)
    except FileNotFoundError:
        raise UserError(f"{flag} {path}: no such file; {remedy}") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{flag} {path}: damaged ({error}); delete it and {remedy}") from None
    missing = [name for name in needed if name not in tensors]
    if missing:
        raise UserError(f"{flag} {path}: holds no {missing[0]}; delete it and {remedy}")
    return tensors


def fingerprint(path: Path) -> str:
    """Hash a model file, or all weights of a folder, so that two models can be told apart quickly.

    Large files are hashed by size and 256 evenly spread pieces (always including the header): a model of 10 GB takes
    milliseconds, and two trainings of one architecture differ everywhere.
    """
    digest = sha256()
    files = sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name if path.is_dir() else ''}:{size}\n".encode())
        with file.open("rb") as stream:
            if size <= _SMALL_FILE:
                digest.update(stream.read())
                continue
            for piece in range(_PIECES):
                stream.seek(piece * (size - _PIECE) // (_PIECES - 1))
                digest.update(stream.read(_PIECE))
    return digest.hexdigest()[:16]


def read_meta(path: Path, *, flag: str) -> dict[str, Any] | None:
    """Read what made a cache; None where there is no such file.

    Raises:
        UserError: the file is no JSON object, or of a later format.
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


def claim_folder(path: Path, made_by: dict[str, Any], *, flag: str) -> None:
    """Write what makes this cache, or check that an earlier run was made by the same.

    Raises:
        UserError: the folder's cache was made by other models or settings; the first difference is named.
    """
    wanted = {"format": FORMAT, **made_by}
    found = read_meta(path, flag=flag)
    if found is None:
        write_json(path, wanted)
        return
    for key in sorted(wanted.keys() | found.keys()):
        if wanted.get(key) != found.get(key):
            raise UserError(
                f"{flag} {path.parent}: was made with {key} {found.get(key)}, now it is {wanted.get(key)}; "
                "a cache can't be a mix: delete this folder, or use the same models and settings"
            )
