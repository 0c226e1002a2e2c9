"""Atomic writes: a file under its final name is always whole."""

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

TEMPORARY = re.compile(r"\..*\.\d+\.tmp(\.[^.]*)?", re.DOTALL)  # names that `write_atomically` writes to first
_SAFETENSORS_TEMPORARY = re.compile(r"\.tmp\w{6}")  # names that safetensors writes to before that


def is_left_over(path: Path) -> bool:
    """Whether a file or folder has a name that nothing finished has: a run was killed while it wrote."""
    return bool(TEMPORARY.fullmatch(path.name) or _SAFETENSORS_TEMPORARY.fullmatch(path.name))


def left_overs(folder: Path) -> list[Path]:
    """List what killed runs left in a folder, not in those below it; nothing if there is no such folder."""
    return [path for path in folder.glob(".*") if is_left_over(path)]


@contextmanager
def write_atomically(path: str | Path, *, durable: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it takes the final name only when the block ends without an error.

    The parent folder is made if need be. The temporary name keeps the ending: some writers choose the format by it.
    A `durable` file is on the disk before it has its name, and its name is before this returns.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        temporary.chmod(0o644)  # safetensors writes files that only their owner may read
        if durable:
            flush_to_disk(temporary)
        os.replace(temporary, path)
        if durable:
            flush_to_disk(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def flush_to_disk(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, would survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_lines(path: Path) -> tuple[str, ...]:
    """Read the lines of a UTF-8 text that say something, without the white space at their ends.

    A byte-order mark doesn't count. Raises what reading does: OSError, UnicodeDecodeError.
    """
    return tuple(text for line in path.read_text(encoding="utf-8-sig").splitlines() if (text := line.strip()))


def write_text(path: str | Path, text: str, *, durable: bool = False) -> None:
    """Write UTF-8 text atomically."""
    with write_atomically(path, durable=durable) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any, *, durable: bool = False) -> None:
    """Write a JSON file atomically, with sorted keys, so that equal values give equal bytes."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", durable=durable)


def save_tensors(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, Any] | None = None,
    *,
    durable: bool = False,
) -> None:
    """Write a safetensors file atomically.

    `metadata` goes into the header as ONE key, `jointdit`, holding JSON with sorted keys: several header keys are
    written in random order, so that equal models would differ in bytes.
    """
    header = {"jointdit": json.dumps(metadata, sort_keys=True)} if metadata is not None else None
    with write_atomically(path, durable=durable) as temporary:
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary, metadata=header
        )
