"""Files of one result: picture, depth, a map to look at, and what made them; nothing earlier is overwritten."""

import hashlib
import os
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from torch import Tensor

from library.files import write_json
from library.images import DEPTH_NOTE, colorize, write_depth_npy, write_depth_png16, write_rgb

_ENDINGS = {"image": ".png", "depth_png16": "_depth.png", "depth_npy": "_depth.npy", "depth_color": "_depth_color.png"}
_RECORD = ".json"
_VERSIONED = ("jointdit", "torch", "transformers", "safetensors", "numpy", "Pillow")


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """One sample: colours in [0, 1], relative disparity in [0, 1] (near = large), both at the size of the output."""

    rgb_3hw: Tensor
    depth_hw: Tensor
    seed: int


def save_result(folder: Path, *, name: str, result: Result, record: Mapping[str, Any]) -> Path:
    """Write all files of a result and return the JSON's path.

    The names are NAME.png, NAME_depth.png (16 bit), NAME_depth.npy (float32), NAME_depth_color.png and NAME.json, with
    _2, _3, ... after NAME if any of them is taken. `record` is what the JSON says besides the files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stem = free_stem(folder, name)
    paths = {kind: folder / f"{stem}{ending}" for kind, ending in _ENDINGS.items()}
    write_rgb(paths["image"], result.rgb_3hw)
    write_depth_png16(paths["depth_png16"], result.depth_hw)
    write_depth_npy(paths["depth_npy"], result.depth_hw)
    write_rgb(paths["depth_color"], colorize(result.depth_hw))
    written = {kind: {"file": path.name, "sha256": file_hash(path)} for kind, path in paths.items()}
    path = folder / f"{stem}{_RECORD}"
    write_json(path, {**record, "seed": result.seed, "depth": DEPTH_NOTE, "files": written})
    return path


def free_stem(folder: Path, name: str) -> str:
    """Return `name`, or `name` with the first number from 2 on with which no file of the set exists yet."""
    stem, number = name, 1
    while any((folder / f"{stem}{ending}").exists() for ending in (*_ENDINGS.values(), _RECORD)):
        number += 1
        stem = f"{name}_{number}"
    return stem


def name_from(text: str) -> str:
    """Return a file name made of a prompt: lower-case words joined by dashes, at most about 40 characters."""
    words = re.findall(r"[^\W_]+", text.lower())
    name = ""
    for word in words:
        if name and len(name) + len(word) >= 40:
            break
        name = f"{name}-{word}" if name else word[:40]
    return name or "sample"


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file's bytes in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def machine() -> str:
    """Return in words what a figure was measured on."""
    return f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide a result."""
    found = {"python": platform.python_version()}
    for package in _VERSIONED:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
