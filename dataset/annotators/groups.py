"""Work on a stream of samples in groups whose results appear all together or not at all.

A network's last digits depend on what else is in the batch. Groups are formed from the fixed order of all samples and
finished as wholes, so that a run that was killed anywhere ends, after another run, with the bytes of one that wasn't.
"""

import os
import shutil
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from library.cli import process_rank

T = TypeVar("T")

_BEGUN, _WHOLE = ".begun-", ".whole-"


def group_by(items: Iterable[T], *, size: int, key: Callable[[T], Hashable]) -> Iterator[list[T]]:
    """Yield lists of `size` items with equal keys, in a fixed order; the last of each key may be shorter."""
    open_groups: dict[Hashable, list[T]] = {}
    for item in items:
        group = open_groups.setdefault(key(item), [])
        group.append(item)
        if len(group) == size:
            yield open_groups.pop(key(item))
    yield from open_groups.values()


def write_group(folder: Path, files: Mapping[str, Callable[[Path], None]]) -> None:
    """Write several files into `folder` so that after a kill at any moment `finish_groups` gives all or none of them.

    `files` holds, by file name, what writes one to the path it is given. A file that is there already stays.
    """
    begun, whole = (folder / f"{state}{process_rank()}" for state in (_BEGUN, _WHOLE))
    begun.mkdir(parents=True)
    for name, write in files.items():
        write(begun / name)
    begun.rename(whole)
    _take_out(whole)


def finish_groups(folder: Path) -> None:
    """Put right what processes that were killed left in `folder`."""
    for begun in folder.glob(f"{_BEGUN}*"):
        shutil.rmtree(begun)
    for whole in folder.glob(f"{_WHOLE}*"):
        _take_out(whole)


def _take_out(whole: Path) -> None:
    for path in sorted(whole.iterdir()):
        target = whole.parent / path.name
        if target.exists():
            path.unlink()
        else:
            os.replace(path, target)
    whole.rmdir()
