"""Lists a prepared folder once and keeps the result in its index (`dataset.sample_index`)."""

import logging
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import chain
from os import DirEntry
from pathlib import Path

from dataset.cache import latent_size
from dataset.layout import IMAGE_SUFFIXES, Layout
from dataset.sample_index import SETTLED_NS, Row, SampleIndex, Stored, modified, now, read_index, scan, write_index
from dataset.shards import read_shard_indexes, shard_rows

log = logging.getLogger(__name__)

Size = tuple[int, int]  # rows and columns; 0 if unknown

_READERS = 8  # threads: what takes time is waiting for the disk or the network
_PART = 500  # files a thread opens at a time
_MANY = 10_000  # files to open from which on a line in the log tells why the start takes a while


def list_pictures(layout: Layout) -> SampleIndex:
    """Names of all images, sorted, and their sizes in pixels.

    Sizes are read off the depth maps' headers, once. Notes: `missing`, how many depth maps and captions there aren't,
    and `first_missing`, one of them.
    """
    folders = [layout.processed_images, layout.depthmaps, layout.text_prompts]
    began, times = now(), modified(folders)
    stored = read_index(layout.pictures_index, folders)
    if stored is not None and stored.fresh:
        return stored.index
    names = {name for name, _ in scan(layout.processed_images, *IMAGE_SUFFIXES)}
    depthmaps, captions = set(names), set(names)  # whose files are still to be met

    def met() -> Iterator[tuple[str, DirEntry[str]]]:
        for name, entry in scan(layout.depthmaps, ".npy"):
            if name in names:
                depthmaps.discard(name)
                yield name, entry

    def without() -> Iterator[Row]:
        yield from map(Row, depthmaps)

    sized = read_sizes(met(), lambda name: depthmap_size(layout.depthmap(name)), stored=stored, what="depth maps")
    index = SampleIndex.of(chain(sized, without()))
    for name, _ in scan(layout.text_prompts, ".txt"):
        captions.discard(name)
    lacking = [layout.depthmap(name) for name in depthmaps] + [layout.prompt(name) for name in captions]
    notes = {"missing": len(lacking), "first_missing": str(min(lacking, default=""))}
    return _keep(replace(index, notes=notes), layout.pictures_index, folders=times, began=began)


def list_cache(layout: Layout, *, stamp: str, flag: str) -> SampleIndex:
    """Names of all cached samples, sorted, the sizes of their latents, and where they lie.

    Notes: `uncached`, how many images have no cached sample, and `first_uncached`, one of them.

    Raises:
        UserError: a shard's index is damaged, or is another cache's.
    """
    folders = [layout.cache, layout.processed_images]
    began, times = now(), modified(folders)
    stored = read_index(layout.cache_index, folders)
    if stored is not None and stored.fresh and stored.index.notes.get("stamp") == stamp:
        return stored.index
    sharded: set[str] = set()

    def in_shards() -> Iterator[Row]:
        for number, samples in read_shard_indexes(layout, flag=flag, stamp=stamp):
            yield from shard_rows(number, {name: place for name, place in samples.items() if name not in sharded})
            sharded.update(samples)

    def in_files() -> Iterator[tuple[str, DirEntry[str]]]:
        return ((name, entry) for name, entry in scan(layout.cache, ".safetensors") if name not in sharded)

    # One after the other: what lies in shards is known when the files come.
    sized = read_sizes(in_files(), lambda name: latent_size(layout.cached(name)), stored=stored, what="cached samples")
    index = SampleIndex.of(chain(in_shards(), sized))
    uncached = {name for name, _ in scan(layout.processed_images, *IMAGE_SUFFIXES)}.difference(index.names)
    notes = {"stamp": stamp, "uncached": len(uncached), "first_uncached": min(uncached, default="")}
    return _keep(replace(index, notes=notes), layout.cache_index, folders=times, began=began)


def _keep(index: SampleIndex, path: Path, *, folders: dict[str, int], began: int) -> SampleIndex:
    """Write an index that holds something, and return it."""
    if len(index):
        write_index(path, index, folders=folders, began=began)
    return index


def read_sizes(
    files: Iterator[tuple[str, DirEntry[str]]], read: Callable[[str], Size], *, stored: Stored | None, what: str
) -> Iterator[Row]:
    """Give files of their own their sizes: as an older index has them if the file hasn't changed, or read from it.

    A file's ctime says when it last changed; unlike its modification time nobody can set it back.
    """
    known = _known_sizes(stored.index) if stored is not None else {}
    before = stored.began - SETTLED_NS if stored is not None else 0
    unknown = []
    for name, entry in files:
        told = entry.stat()
        if told.st_size == 0:
            yield Row(name)
        elif told.st_ctime_ns < before and name in known:
            yield Row(name, *known[name])
        else:
            unknown.append(name)
    if len(unknown) >= _MANY:
        log.info("Reading the sizes of %d %s, this once", len(unknown), what)
    for name, (height, width) in zip(unknown, _read_all(read, unknown), strict=True):
        yield Row(name, height, width)


def _known_sizes(index: SampleIndex) -> dict[str, Size]:
    columns = (index.columns[side].tolist() for side in ("height", "width", "shard"))
    rows = zip(index.names, *columns, strict=True)
    return {name: (height, width) for name, height, width, shard in rows if height and shard < 0}


def _read_all(read: Callable[[str], Size], names: list[str]) -> Iterator[Size]:
    """Read many headers, some at a time, in order."""
    if len(names) < _READERS:
        yield from map(read, names)
        return
    with ThreadPoolExecutor(_READERS) as pool:
        parts = (names[start : start + _PART] for start in range(0, len(names), _PART))
        for sizes in pool.map(lambda part: [read(name) for name in part], parts):
            yield from sizes


def depthmap_size(path: Path) -> Size:
    """Rows and columns of a depth map, from the header of its .npy file alone; (0, 0) where that can't be read."""
    try:
        with path.open("rb") as file:
            found = re.search(rb"'shape': \(([0-9, ]+)\)", file.read(256))
    except OSError:
        return 0, 0
    shape = [int(side) for side in found[1].split(b",") if side.strip()] if found else []
    if len(shape) == 3:  # one channel before or after, as `library.images.read_depth` takes them
        shape = shape[1:] if shape[0] == 1 else shape[:2]
    return (shape[0], shape[1]) if len(shape) == 2 else (0, 0)
