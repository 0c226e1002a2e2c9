"""The report of step 1: a line of JSON for every source, then one for every sample that lacks its depth map or caption.

Each process writes its own part, and the first one joins them. The report says what is there, not what this run did:
an interrupted run and the one that finishes it end with the same report as one that went through.
"""

import heapq
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from dataset.layout import Layout
from library.cli import process_count, process_rank
from library.files import write_atomically

PICTURES, DEPTH, CAPTIONS = "pictures", "depth", "captions"
STAGES = (PICTURES, DEPTH, CAPTIONS)
READY, TOO_SMALL, NOT_READ, LEFT_OUT = "ready", "too small", "not read", "left out"

_NAMED = 10  # problems on the screen; the report has all

Line = dict[str, Any]


class Part:
    """This process's part of one stage's report, on disk: there may be millions of lines."""

    def __init__(self, layout: Layout, stage: str, *, process: int | None = None) -> None:
        """Name the part; it needs no file to exist yet."""
        number = process_rank() if process is None else process
        self.path = layout.step1_parts / f"{stage}-{number}.jsonl"

    @contextmanager
    def writing(self) -> Iterator[Callable[[Line], object]]:
        """Begin the part anew and yield a function that adds a line."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("wb") as file:
            yield lambda line: file.write(_to_bytes(line))

    def __iter__(self) -> Iterator[Line]:
        """Read the lines one by one; none where the stage didn't run."""
        if self.path.exists():
            with self.path.open(encoding="utf-8") as file:
                yield from map(json.loads, file)


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """How many sources had each outcome, how many samples lack what, and the first of what went wrong."""

    counts: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)


def join_parts(layout: Layout) -> Summary:
    """Write the report from the parts of all processes, pictures sorted by source, and remove them."""
    summary = Summary()
    with write_atomically(layout.step1_report) as temporary, temporary.open("wb") as file:
        for stage in STAGES:
            parts = [Part(layout, stage, process=process) for process in range(process_count())]
            for line in heapq.merge(*parts, key=_source_parts) if stage == PICTURES else chain(*parts):
                file.write(_to_bytes(line))
                summary.counts[line["outcome"]] += 1
                if line["outcome"] != READY and len(summary.problems) < _NAMED:
                    which = line.get("source") or line["name"]
                    summary.problems.append(f"{shown(which)}: {line['outcome']}: {shown(line['reason'])}")
    shutil.rmtree(layout.step1_parts)
    return summary


def shown(text: str) -> str:
    """Return a text of unknown origin in a form that a screen can show: nothing but printable letters."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape", "surrogatepass").decode() for letter in text
    )


def _source_parts(line: Line) -> list[str]:
    return line["source"].split("/")


def _to_bytes(line: Line) -> bytes:
    """Encode a line; bytes in names that are no UTF-8 become JSON's own escapes."""
    return json.dumps(line, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
