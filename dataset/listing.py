"""Lists a prepared folder once and keeps the result in its index (`dataset.sample_index`)."""

import logging
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
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
    names = {Path(entry.name).stem for entry in scan(layout.processed_images, IMAGE_SUFFIXES)}
    lacking = {"depth map": set(names), "caption": set(names)}
    reuse = _Reuse(stored)
    for entry in scan(layout.depthmaps, ".npy"):
        name = entry.name[: -len(".npy")]
        if name in names:
            lacking["depth map"].discard(name)
            reuse.add(name, entry)
    for entry in scan(layout.text_prompts, ".txt"):
        lacking["caption"].discard(entry.name[: -len(".txt")])
    reuse.rows += [Row(name=name) for name in lacking["depth map"]]
    missing = [str(layout.depthmap(name)) for name in sorted(lacking["depth map"])]
    missing += [str(layout.prompt(name)) for name in sorted(lacking["caption"])]
    rows = reuse.complete(lambda name: depthmap_size(layout.depthmap(name)), what="depth maps")
    index = SampleIndex.of(rows, {"missing": len(missing), "first_missing": missing[0] if missing else ""})
    if rows:
        write_index(layout.pictures_index, index, folders=times, began=began)
    return index


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
    reuse = _Reuse(stored)
    sharded: set[str] = set()
    for number, samples in read_shard_indexes(layout, flag=flag, stamp=stamp):
        reuse.rows += shard_rows(number, {name: place for name, place in samples.items() if name not in sharded})
        sharded |= samples.keys()
    for entry in scan(layout.cache, ".safetensors"):
        name = entry.name[: -len(".safetensors")]
        if name not in sharded:
            reuse.add(name, entry)
    rows = reuse.complete(lambda name: latent_size(layout.cached(name)), what="cached samples")
    uncached = {Path(entry.name).stem for entry in scan(layout.processed_images, IMAGE_SUFFIXES)}
    uncached -= {row.name for row in rows}
    notes = {"stamp": stamp, "uncached": len(uncached), "first_uncached": min(uncached, default="")}
    index = SampleIndex.of(rows, notes)
    if rows:
        write_index(layout.cache_index, index, folders=times, began=began)
    return index


class _Reuse:
    """Rows of files of their own: sizes are taken from an older index where the file hasn't changed since."""

    def __init__(self, stored: Stored | None) -> None:
        self.stored = stored
        self.places = {name: place for place, name in enumerate(stored.index.names)} if stored is not None else {}
        self.rows: list[Row] = []
        self.unknown: list[str] = []

    def add(self, name: str, entry: DirEntry[str]) -> None:
        """Note a file; nobody can set back the time at which its entry last changed."""
        told = entry.stat()
        place = self.places.get(name)
        if self.stored is not None and place is not None and self.stored.began - told.st_ctime_ns > SETTLED_NS:
            old = self.stored.index[place]
            if old.height and old.shard < 0:
                self.rows.append(Row(name=name, height=old.height, width=old.width))
                return
        if told.st_size == 0:
            self.rows.append(Row(name=name))
        else:
            self.unknown.append(name)

    def complete(self, read: Callable[[str], Size], *, what: str) -> list[Row]:
        """Read the sizes still unknown and return all rows."""
        if len(self.unknown) >= _MANY:
            log.info("Reading the sizes of %d %s, this once", len(self.unknown), what)
        for name, (height, width) in zip(self.unknown, _read_all(read, self.unknown), strict=True):
            self.rows.append(Row(name=name, height=height, width=width))
        return self.rows


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
