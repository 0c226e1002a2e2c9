"""The user's files below an image folder, in one fixed order, and the sample names they get.

A picture that step 1 has moved or copied to `raw_images/` keeps its path there, so it is the same source before and
after. Names depend on nothing but a picture's own path, and on which names are taken when it is first processed.
"""

import filecmp
import heapq
import os
import unicodedata
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, groupby
from pathlib import Path

from dataset.layout import OWN_FILES, OWN_FOLDERS, Layout

_LONGEST = 120  # bytes of a name; file systems allow 255, endings and temporary names need some
_NOT_IN_NAMES = '~\\:*?"<>|'  # "~" parts a name from what makes it unique; the others are refused by some systems


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One file. `relative` is its path below the image folder, also when it lies in `raw_images/` by now.

    `fresh` is where the user put it, `stored` its place in `raw_images/`; one of them may be missing. `linked` says
    that it is a link to a file elsewhere, `problem` why it isn't to be opened at all.
    """

    relative: str
    fresh: Path | None = None
    stored: Path | None = None
    linked: bool = False
    problem: str | None = None

    @property
    def path(self) -> Path:
        """Where the file can be read."""
        found = self.fresh or self.stored
        assert found is not None
        return found


def list_sources(layout: Layout) -> Iterator[Source]:
    """Yield all files below the folder, hidden ones and this project's own left out, sorted by their path's parts.

    Only the names of the folders that are being listed are held in memory. A file that is both in its place and in
    `raw_images/` is one source if the two are equal, and two otherwise, the second with a problem.
    """
    root = Path(layout.root)
    fresh = ((entry.parts, 0, entry) for entry in _walk(root, root, OWN_FOLDERS + OWN_FILES))
    stored = ((entry.parts, 1, entry) for entry in _walk(layout.raw_images, root, ()))
    merged = heapq.merge(fresh, stored, key=lambda item: item[:2])
    for parts, group in groupby(merged, key=lambda item: item[0]):
        yield from _join("/".join(parts), {place == 0: entry for _, place, entry in group})


def base_name(relative: str) -> str:
    """Return the name a file gets if it is free: folders and stem joined by two underscores.

    Letters of all languages, digits, spaces and most signs stay; what can't be printed or is refused by some file
    system becomes an underscore, and a long name is cut and ends with a checksum of the path.
    """
    *folders, file = relative.split("/")
    text = unicodedata.normalize("NFC", "__".join([*folders, os.path.splitext(file)[0]]))
    text = "".join(letter if letter.isprintable() and letter not in _NOT_IN_NAMES else "_" for letter in text)
    text = text.strip(" .") or "_"
    text = "_" + text[1:] if text[0] == "-" else text  # a name that reads like a flag
    if len(text.encode()) <= _LONGEST:
        return text
    checksum = f"{zlib.crc32(os.fsencode(relative)):08x}"
    return text.encode()[: _LONGEST - 9].decode(errors="ignore").rstrip(" .") + "~" + checksum


def candidate_names(relative: str) -> Iterator[str]:
    """Yield the names a file may get, best first: `a`, then `a~png` (its ending), then `a~png~2` and on."""
    base = base_name(relative)
    ending = "".join(each for each in os.path.splitext(relative)[1].lower() if each.isalnum()) or "file"
    yield base
    yield f"{base}~{ending}"
    for number in count(2):
        yield f"{base}~{ending}~{number}"


def belongs_to(relative: str, *, process: int, processes: int) -> bool:
    """Whether a file is the share of this process; files that compete for a name always go to the same one."""
    return zlib.crc32(base_name(relative).casefold().encode()) % processes == process


@dataclass(frozen=True, kw_only=True, slots=True)
class _Entry:
    """What a listing found; `parts` is the path below the place where the listing began."""

    parts: tuple[str, ...]
    path: Path
    is_folder: bool = False
    linked: bool = False
    problem: str | None = None


def _walk(folder: Path, root: Path, left_out: tuple[str, ...]) -> Iterator[_Entry]:
    """Yield everything below `folder` but folders, sorted by parts."""
    stack = [iter([_Entry(parts=(), path=folder, is_folder=True)])] if folder.is_dir() else []
    while stack:
        entry = next(stack[-1], None)
        if entry is None:
            stack.pop()
        elif not entry.is_folder:
            yield entry
        else:
            try:
                stack.append(_list_folder(entry, root, () if entry.parts else left_out))
            except OSError as error:
                reason = f"a folder that can't be listed ({error.strerror})"
                yield _Entry(parts=entry.parts or (folder.name,), path=entry.path, problem=reason)


def _list_folder(folder: _Entry, root: Path, left_out: tuple[str, ...]) -> Iterator[_Entry]:
    """List a folder now, and return an iterator that makes its sorted entries one by one."""
    names = []
    unusual: dict[str, bool] = {}  # whether it is a folder; the mass, regular files, isn't in here
    with os.scandir(folder.path) as listing:
        for item in listing:
            if not item.name.startswith(".") and item.name not in left_out:
                names.append(item.name)
                if not item.is_file(follow_symlinks=False):
                    unusual[item.name] = item.is_dir(follow_symlinks=False)
    names.sort()

    def entry(name: str) -> _Entry:
        parts, path = (*folder.parts, name), folder.path / name
        if unusual.get(name) is False:
            return _unusual_entry(parts, path, root)
        return _Entry(parts=parts, path=path, is_folder=name in unusual)

    return map(entry, names)


def _unusual_entry(parts: tuple[str, ...], path: Path, root: Path) -> _Entry:
    """Look at what is neither a regular file nor a folder: only a link to a file elsewhere can be used."""
    target = Path(os.path.realpath(path))
    problem = None
    if not path.is_symlink():
        problem = "not a regular file"
    elif target.is_relative_to(os.path.realpath(root)):
        problem = "a link to a place in this folder; what is there is taken there"
    elif target.is_dir():
        problem = "a link to a folder, which isn't entered; put the folder itself here"
    elif not target.is_file():
        problem = "a link that leads nowhere"
    return _Entry(parts=parts, path=path, linked=problem is None, problem=problem)


def _join(relative: str, found: dict[bool, _Entry]) -> Iterator[Source]:
    """Yield the one or two sources of a path that was found fresh (True), in `raw_images/` (False) or both."""
    problems = {is_fresh: entry.problem for is_fresh, entry in found.items() if entry.problem is not None}
    good = {is_fresh: entry for is_fresh, entry in found.items() if is_fresh not in problems}
    if len(good) == 2 and not _same(good[True].path, good[False].path):
        problems[True] = "another picture of this path is in raw_images/ already; rename this one"
        del good[True]
    if good:
        yield Source(
            relative=relative,
            fresh=good[True].path if True in good else None,
            stored=good[False].path if False in good else None,
            linked=any(entry.linked for entry in good.values()),
        )
    for is_fresh, problem in problems.items():
        yield Source(relative=relative, fresh=found[is_fresh].path, problem=problem)


def _same(first: Path, second: Path) -> bool:
    """Whether two files hold the same; equal size and time of change are enough."""
    try:
        return filecmp.cmp(first, second)
    except OSError:
        return False
