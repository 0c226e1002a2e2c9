"""The written index of a prepared folder: names and sizes of all samples, so that a start looks at none of them.

An index belongs to the folders it was made of, and counts as long as their modification times are what they were when
the listing began: a file that is added, removed, renamed or replaced by a rename changes its folder's. (Overwriting a
file in place doesn't; a size that changed so is noticed when the sample is read.) A folder that had changed less than
two seconds before the listing is listed again, since some file systems count time in steps.

Suffix: N samples.
"""

import json
import logging
import os
import time
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from library.files import save_tensors

log = logging.getLogger(__name__)

FORMAT = 1
SETTLED_NS = 2_000_000_000
_COLUMNS = ("height", "width", "shard", "offset", "length")  # of a row, after its name


class Names(Sequence[str]):
    """Names packed into one array: 1,000,000 take some 20 MB, and reader processes share them without a copy."""

    def __init__(self, joined: np.ndarray, ends: np.ndarray) -> None:
        """Take the UTF-8 bytes of all names, one after the other, and where each ends."""
        self.joined = joined
        self.ends = ends

    @classmethod
    def of(cls, names: Iterable[str]) -> "Names":
        """Pack names."""
        encoded = [name.encode() for name in names]
        ends = np.cumsum(np.fromiter(map(len, encoded), dtype=np.int64, count=len(encoded)), dtype=np.int64)
        return cls(np.frombuffer(b"".join(encoded), dtype=np.uint8), ends)

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        start = self.ends[place - 1] if place else 0
        return self.joined[start : self.ends[place]].tobytes().decode()

    def __iter__(self) -> Iterator[str]:
        joined, start = self.joined.tobytes(), 0
        for end in self.ends.tolist():
            yield joined[start:end].decode()
            start = end


class Row(NamedTuple):
    """One sample: its name, its rows and columns (0 if unknown), and where it lies: shard -1 is a file of its own."""

    name: str
    height: int = 0
    width: int = 0
    shard: int = -1
    offset: int = 0
    length: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleIndex:
    """All samples of a folder, sorted by name, and what else was noticed when they were listed."""

    names: Names
    columns: dict[str, np.ndarray]
    notes: dict[str, Any]

    @classmethod
    def of(cls, rows: Iterable[Row], notes: dict[str, Any] | None = None) -> "SampleIndex":
        """Make an index of rows in any order."""
        names: list[str] = []
        values = array("q")
        for name, *numbers in rows:
            names.append(name)
            values.extend(numbers)
        order = sorted(range(len(names)), key=names.__getitem__)
        table = np.array(values, dtype=np.int64).reshape(len(names), len(_COLUMNS))[order]
        columns = {column: table[:, place].copy() for place, column in enumerate(_COLUMNS)}
        return cls(names=Names.of(names[place] for place in order), columns=columns, notes=notes or {})

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Row:
        values = {column: int(values_N[index]) for column, values_N in self.columns.items()}
        return Row(name=self.names[index], **values)

    def buckets(self, *, multiple: int) -> Tensor | None:
        """Number the sizes, cut to a multiple of `multiple` pixels: int64 (N,); None if there is one size only.

        Samples of unknown size (empty or damaged files) count as of the most frequent one.
        """
        sides = [self.columns[side].astype(np.int64) // multiple for side in ("height", "width")]
        keys_N = sides[0] << 32 | sides[1]
        found, counts = np.unique(keys_N[keys_N > 0], return_counts=True)
        if len(found) < 2:
            return None
        keys_N = np.where(keys_N > 0, keys_N, found[counts.argmax()])
        return torch.from_numpy(np.searchsorted(found, keys_N))


@dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
    """An index as it was read: `fresh` if its folders are as they were; `began` is when their listing began (ns)."""

    index: SampleIndex
    fresh: bool
    began: int


def scan(folder: Path, *endings: str) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """List a folder's files of some endings, as the system gives them, each with its name without the ending.

    The endings are given in lower case, with the dot, and hold in any case; "" stands for all.
    Hidden files don't count.
    """
    anything = "" in endings
    if folder.is_dir():
        with os.scandir(folder) as entries:
            for entry in entries:
                stem, ending = os.path.splitext(entry.name)
                if stem[0] != "." and (anything or ending.lower() in endings):
                    yield stem, entry


def modified(folders: Sequence[Path]) -> dict[str, int]:
    """Modification times of folders by their names, in ns; 0 for one that isn't there."""
    return {folder.name: folder.stat().st_mtime_ns if folder.is_dir() else 0 for folder in folders}


def read_index(path: Path, folders: Sequence[Path]) -> Stored | None:
    """Read an index of `folders`; None where there is none of this version that can be read."""
    try:
        with safe_open(path, framework="numpy") as file:
            told = json.loads((file.metadata() or {})["jointdit"])
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
        if told["format"] != FORMAT:
            return None
        names = Names(arrays["joined"], arrays["ends"])
        index = SampleIndex(names=names, columns={each: arrays[each] for each in _COLUMNS}, notes=told["notes"])
        settled = all(told["began"] - each > SETTLED_NS for each in told["folders"].values())
        fresh = settled and told["folders"] == modified(folders)
        return Stored(index=index, fresh=fresh, began=told["began"])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return None


def write_index(path: Path, index: SampleIndex, *, folders: dict[str, int], began: int) -> None:
    """Write an index; a folder that can't be written to goes without one, with a line in the log."""
    arrays = {"joined": index.names.joined, "ends": index.names.ends, **index.columns}
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
    metadata = {"format": FORMAT, "began": began, "folders": folders, "notes": index.notes}
    try:
        save_tensors(path, tensors, metadata)
    except (OSError, SafetensorError) as error:
        log.info(
            "The index of %d samples can't be kept in %s (%s); the next start lists them again", len(index), path, error
        )


def now() -> int:
    """Time in ns, as file systems count it."""
    return time.time_ns()
