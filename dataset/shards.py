"""Tar shards of cached samples: members NAME.safetensors, and beside each shard a JSON file that says where they lie.

A shard is an ordinary tar file that streams, and any member can be read by its offset: the order of training stays
exact. Shards are written one by one under a temporary name; the JSON file comes last and marks a shard as finished.
"""

import io
import json
import re
import tarfile
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from dataset.cache import FORMAT, read_content
from dataset.layout import Layout
from dataset.sample_index import Row, scan
from library.errors import UserError
from library.files import write_atomically, write_json

_SUFFIX = ".safetensors"
_INDEX = re.compile(r"shard_(\d+)")


def write_shard(layout: Layout, number: int, samples: Mapping[str, tuple[bytes, int, int]], *, stamp: str) -> None:
    """Write a shard of samples, by name: content, and rows and columns of the latents. Equal samples, equal bytes."""
    path = layout.shard(number)
    with write_atomically(path) as temporary:
        with tarfile.open(temporary, "w") as tar:
            for name, (content, _, _) in samples.items():
                member = tarfile.TarInfo(name + _SUFFIX)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        with tarfile.open(temporary) as tar:
            places = {member.name.removesuffix(_SUFFIX): (member.offset_data, member.size) for member in tar}
    entries = {
        name: {"offset": offset, "size": size, "height": samples[name][1], "width": samples[name][2]}
        for name, (offset, size) in places.items()
    }
    write_json(layout.shard_index(number), {"format": FORMAT, "stamp": stamp, "samples": entries})


def read_shard_indexes(layout: Layout, *, flag: str, stamp: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the numbers of all finished shards, in rising order, and where their samples lie, by name.

    Raises:
        UserError: a shard's index is damaged, or has another stamp than this cache's.
    """
    found = (_INDEX.fullmatch(name) for name, _ in scan(layout.cache, ".json"))
    numbers = sorted(int(match[1]) for match in found if match)
    for number in numbers:
        path = layout.shard_index(number)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            made_for, samples = content["stamp"], content["samples"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{flag} {path}: damaged ({error}); delete this file and run the preprocessing step again"
            ) from None
        if made_for != stamp:
            raise UserError(
                f"{flag} {path}: its shard was made by other models or settings than this cache's meta.json says; "
                "delete both and run the preprocessing step again"
            )
        yield number, samples


def shard_rows(number: int, samples: Mapping[str, Any]) -> Iterator[Row]:
    """Where a finished shard's samples lie, as rows of a folder's index."""
    for name, entry in samples.items():
        yield Row(
            name=name,
            height=entry["height"],
            width=entry["width"],
            shard=number,
            offset=entry["offset"],
            length=entry["size"],
        )


def read_member(layout: Layout, row: Row, *, flag: str) -> tuple[Tensor, str]:
    """Read one sample's bytes from its shard or its own file; also say, for a person, where that is.

    Raises:
        BadSample: the file is missing or too short.
    """
    if row.shard < 0:
        where = f"{flag} {layout.cached(row.name)}"
        return read_content(layout.cached(row.name), where=where), where
    path = layout.shard(row.shard)
    where = f"{flag} {path}, {row.name}"
    return read_content(path, where=where, offset=row.offset, length=row.length), where
