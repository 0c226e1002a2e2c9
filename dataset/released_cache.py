"""Reads the caches of the released code: one `.pt` file for each sample and kind, in folders by kind.

Such files are pickles, which can run programs when read. Here torch's restricted reader takes nothing but tensors out
of them, and a file that holds anything else is refused.

Shape suffixes: L tokens, D width, C channels, h w latent rows and columns.
"""

import json
import os
import pickle
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from library.errors import UserError, first_line
from library.flux.text import TextFeatures, text_ids
from library.modality import DEPTH_TRANSFORMS, MODALITIES

IMAGE_LATENTS, DEPTH_LATENTS = (MODALITIES[name].latent_folder for name in ("rgb", "depth"))
CLIP_LATENTS, T5_LATENTS, TEXT_IDS, MASKS = "clip_latents", "t5_latents", "txt_ids", "attn_masks"
TRANSFORM_FILE = "depth_transform.json"

LATENT_CHANNELS = 16


class Refused(Exception):
    """A file isn't what it should be; the message begins with its path."""


def list_released(folder: Path) -> Iterator[str]:
    """Yield the names of a released cache's samples, in the order the file system gives them."""
    with os.scandir(folder / IMAGE_LATENTS) as entries:
        for entry in entries:
            if entry.name.endswith(".pt") and entry.name[0] != ".":
                yield entry.name.removesuffix(".pt")


def read_transform(folder: Path, *, given: str | None) -> str:
    """Return the depth transform that a released cache states, or the one `given` where it states none.

    Raises:
        UserError: none is stated or given, or the two differ.
    """
    path = folder / TRANSFORM_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if given is None:
            raise UserError(f"--cache {folder}: has no {TRANSFORM_FILE}; say --depth_transform") from None
        return given
    except (OSError, ValueError) as error:
        raise UserError(f"--cache {path}: can't be read ({error}); mend it or delete it") from None
    stated = content.get("depth_transform") if isinstance(content, dict) else content
    if stated not in DEPTH_TRANSFORMS:
        raise UserError(f"--cache {path}: says {stated!r}, not one of {', '.join(DEPTH_TRANSFORMS)}; mend it")
    if given not in (None, stated):
        raise UserError(f"--depth_transform {given}: {path} says {stated}; leave the flag away")
    return str(stated)


def read_tensor(path: Path) -> Tensor:
    """Read the one tensor that a `.pt` file holds; nothing in the file is run.

    Raises:
        Refused: the file is missing or damaged, or holds anything but a plain tensor of finite numbers.
    """
    try:
        value = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise Refused(f"{path}: missing") from None
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL (\S+)", str(error))
        what = f" (it asks for {asked[1]}, which wasn't run)" if asked else ""
        raise Refused(f"{path}: holds more than tensors, or is none of torch's files{what}") from None
    except Exception as error:  # damage comes as many kinds
        raise Refused(f"{path}: damaged ({first_line(error)[:120]})") from None
    if type(value) is not Tensor or value.layout is not torch.strided or value.device.type != "cpu":
        raise Refused(f"{path}: holds {_kind_of(value)}, not a plain tensor")
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise Refused(f"{path}: claims the shape {tuple(value.shape)} but doesn't hold so many numbers")
    if value.is_floating_point() and not bool(value.isfinite().all()):
        raise Refused(f"{path}: holds NaN or infinite values")
    return value


def read_latent(path: Path) -> Tensor:
    """Read a latent (C, h, w), with or without a first axis of length 1.

    Raises:
        Refused: see `read_tensor`, or its shape or type is another.
    """
    latent_Chw = _floats(path, axes=3, wanted=f"({LATENT_CHANNELS}, rows, columns)")
    if latent_Chw.shape[0] != LATENT_CHANNELS:
        raise Refused(f"{path}: has {latent_Chw.shape[0]} channels, a latent has {LATENT_CHANNELS}")
    return latent_Chw


def read_text(folder: Path, name: str, *, with_mask: bool) -> TextFeatures:
    """Read a prompt's features (B = 1) from the folders of kinds below `folder`; `with_mask` takes T5's mask along.

    Text positions that are all zero, as Flux has them, are left out; (position, 0, 0) are kept.

    Raises:
        Refused: see `read_tensor`, or shapes don't fit one another, or positions are neither.
    """
    tokens_LD = _floats(folder / T5_LATENTS / f"{name}.pt", axes=2, wanted="(tokens, width)")
    pooled_D = _floats(folder / CLIP_LATENTS / f"{name}.pt", axes=1, wanted="(width,)")
    length = len(tokens_LD)
    mask_BL, ids_BL3 = None, None
    if with_mask:
        path = folder / MASKS / f"{name}.pt"
        mask = _without_ones(read_tensor(path), axes=1)
        if mask.shape != (length,):
            raise Refused(f"{path}: has the shape {tuple(mask.shape)}, its T5 features {length} tokens")
        mask_BL = (mask != 0)[None]
    path = folder / TEXT_IDS / f"{name}.pt"
    if path.exists():
        ids_L3 = _without_ones(read_tensor(path), axes=2)
        numbered_BL3 = text_ids(1, length)
        if ids_L3.shape == (length, 3) and torch.equal(ids_L3.float(), numbered_BL3[0]):
            ids_BL3 = numbered_BL3
        elif ids_L3.shape != (length, 3) or bool(ids_L3.any()):
            raise Refused(f"{path}: holds text positions that are neither zero nor (position, 0, 0)")
    return TextFeatures(tokens_BLD=tokens_LD[None], pooled_BD=pooled_D[None], mask_BL=mask_BL, ids_BL3=ids_BL3)


def _floats(path: Path, *, axes: int, wanted: str) -> Tensor:
    tensor = _without_ones(read_tensor(path), axes=axes)
    if tensor.ndim != axes or not tensor.numel() or not tensor.is_floating_point():
        raise Refused(f"{path}: holds {tensor.dtype} of the shape {tuple(tensor.shape)}, not floats {wanted}")
    return tensor


def _without_ones(tensor: Tensor, *, axes: int) -> Tensor:
    """Drop first axes of length 1 down to `axes` axes."""
    while tensor.ndim > axes and tensor.shape[0] == 1:
        tensor = tensor[0]
    return tensor


def _kind_of(value: object) -> str:
    return "a special tensor" if isinstance(value, Tensor) else f"a {type(value).__name__}"
