"""Reading weights: where each tensor of a checkpoint lies, what is told beside it, and strict loading into a module.

A checkpoint is one safetensors file or a folder with shards. What shapes can't tell comes, in this order, from
`<stem>.json`, `config.json` in the same folder, and the file's header (JSON under the key `jointdit`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from library.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """Where every tensor of a checkpoint lies, and the settings told beside it."""

    flag: str
    path: Path
    files: Mapping[str, Path]
    shapes: Mapping[str, tuple[int, ...]]
    config: Mapping[str, Any]
    header: Mapping[str, Any]

    def fail(self, what: str) -> UserError:
        """Make the error that names the flag and the path."""
        return UserError(f"{self.flag} {self.path}: {what}")

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor that must be there."""
        if name not in self.shapes:
            found = ", ".join(sorted(self.shapes)[:3]) or "nothing"
            raise self.fail(f"no tensor {name}, so this isn't what this flag wants (it holds {found}, ...)")
        return self.shapes[name]

    def count(self, pattern: str) -> int:
        """Number of layers: 1 + the highest index that `pattern`'s group finds among the names."""
        return 1 + max((int(found[1]) for name in self.shapes if (found := re.match(pattern, name))), default=-1)

    def checked(self, sizes: Mapping[str, Any]) -> dict[str, Any]:
        """Return `sizes` (read off the tensors) after comparing them with what the configuration states."""
        for name, size in sizes.items():
            stated = self.config.get(name, size)
            if (tuple(stated) if isinstance(stated, list) else stated) != size:
                raise self.fail(f"its configuration says {name} = {stated}, its tensors {size}; mend the JSON")
        return dict(sizes)

    @contextmanager
    def reader(self) -> Iterator[Callable[[str], Tensor]]:
        """Yield a function that reads one tensor by its name in the file."""
        with ExitStack() as stack:
            opened = {
                file: stack.enter_context(safe_open(file, framework="pt")) for file in sorted(set(self.files.values()))
            }
            yield lambda name: opened[self.files[name]].get_tensor(name)


@dataclass(frozen=True, kw_only=True, slots=True)
class Merged:
    """A tensor of ours that the file keeps in several parts, or in another order."""

    parts: Sequence[str]
    merge: Callable[[list[Tensor]], Tensor]


Source = str | Merged


def parts_of(source: Source) -> Sequence[str]:
    """Names in the file of what a tensor of ours is made of."""
    return (source,) if isinstance(source, str) else source.parts


def open_checkpoint(
    path: str | Path,
    *,
    flag: str,
    model_types: Collection[str],
    translate: Callable[[Mapping[str, Any]], dict[str, Any]] = dict,
) -> Checkpoint:
    """Read names and shapes only; tensors are read one by one later.

    Args:
        path: one file, or a folder with shards.
        flag: that names it on the command line.
        model_types: whose JSON files concern this model; files that name another are passed over.
        translate: turns one JSON file's settings into ours.
    """
    path = Path(path)
    files = safetensors_files(path, flag=flag)
    owner: dict[str, Path] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    header: dict[str, Any] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                header |= json.loads((opened.metadata() or {}).get("jointdit", "{}"))
                for name in opened.keys():  # noqa: SIM118 - a safe_open is no mapping
                    owner[name] = file
                    shapes[name] = tuple(opened.get_slice(name).get_shape())
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"{flag} {file}: not a readable safetensors file ({error})") from error
    config = dict(header.get("config", header))
    folder = path if path.is_dir() else path.parent
    config |= translate(_read_config(folder / "config.json", flag=flag, model_types=model_types))
    if path.is_file():
        config |= translate(_read_config(path.with_suffix(".json"), flag=flag, model_types=model_types))
    return Checkpoint(flag=flag, path=path, files=owner, shapes=shapes, config=config, header=header)


def safetensors_files(path: Path, *, flag: str) -> list[Path]:
    """List the file itself, or the shards of a folder by its index."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{flag} {path}: no such file or folder")
    files = (
        [path / "model.safetensors"] if (path / "model.safetensors").is_file() else sorted(path.glob("*.safetensors"))
    )
    for index in sorted(path.glob("*.safetensors.index.json")):
        files = [path / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise UserError(f"{flag} {path}: {index.name} names {', '.join(missing[:3])}, which isn't there")
    if not files:
        raise UserError(f"{flag} {path}: no safetensors file in this folder")
    return files


def read_json(path: Path, *, flag: str) -> Any:
    """Read a JSON file that belongs to weights.

    Raises:
        UserError: it isn't JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{flag} {path}: not readable as JSON ({error})") from error


def _read_config(path: Path, *, flag: str, model_types: Collection[str]) -> dict[str, Any]:
    """Return a JSON file's settings; nothing if it isn't there or is another model's (folders are often shared)."""
    if not path.is_file():
        return {}
    config = read_json(path, flag=flag)
    if not isinstance(config, dict):
        return {}
    if config.get("model_type", config.get("_class_name", next(iter(model_types), ""))) not in model_types:
        return {}
    return config.get("text_config") or config


def fill(
    make: Callable[[], nn.Module],
    checkpoint: Checkpoint,
    sources: Mapping[str, Source],
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    partly: bool = False,
) -> Any:
    """Make a module on the meta device, check every name, then fill it tensor by tensor.

    Args:
        make: builds the module.
        checkpoint: where the tensors lie.
        sources: what each tensor of the module is made of.
        dtype: of the weights; converted one tensor at a time, so that no second copy of a model is ever in memory.
        device: of the weights.
        partly: the module keeps the tensors that `sources` doesn't name on the meta device (another file brings them).

    Raises:
        UserError: naming the flag, the file and the first names, if one is missing, unknown or of a wrong shape.
    """
    with torch.device("meta"):
        model = make()
    assign(model, checkpoint, sources, dtype=dtype, device=device, partly=partly)
    return model.eval().requires_grad_(False)


def assign(
    model: nn.Module,
    checkpoint: Checkpoint,
    sources: Mapping[str, Source],
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    partly: bool = False,
) -> None:
    """Give a module on the meta device its tensors; see `fill`."""
    wanted = model.state_dict()
    missing = set() if partly else wanted.keys() - sources.keys()
    missing |= {part for source in sources.values() for part in parts_of(source)} - checkpoint.files.keys()
    for what, wrong in (("lacks", missing), ("has the unknown", sources.keys() - wanted.keys())):
        if wrong:
            raise checkpoint.fail(f"{what} {', '.join(sorted(wrong)[:3])} ({len(wrong)} tensors)")
    loaded: dict[str, Tensor] = {}
    with checkpoint.reader() as read:
        for name, source in sources.items():
            tensor = read(source) if isinstance(source, str) else source.merge([read(part) for part in source.parts])
            if tensor.shape != wanted[name].shape:
                raise checkpoint.fail(f"{name} is {tuple(tensor.shape)}, expected {tuple(wanted[name].shape)}")
            loaded[name] = tensor.to(device=device, dtype=dtype)
    model.load_state_dict(loaded, assign=True, strict=not partly)
