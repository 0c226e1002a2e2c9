"""Pictures in: each source read, cut and resized to its sample's size, and its original kept.

The processed picture is written first and carries the path of its source; then the original is moved or copied. So a
run that was stopped anywhere can find out by itself what is left to do, and no original is ever the only copy of a
thing that is being written.
"""

import errno
import filecmp
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataset.layout import IMAGE_SUFFIXES, RAW_IMAGES, Layout
from dataset.sources import Source, candidate_names
from dataset.step1_report import LEFT_OUT, NOT_READ, READY, TOO_SMALL
from library.errors import UserError
from library.files import flush_to_disk
from library.images import read_fitted, read_notes, read_rgb, write_noted_png
from library.sizes import PIXELS_PER_TOKEN

ORIGINALS = ("move", "copy", "keep")

_BUCKET_STEP = 8  # neighbouring buckets differ by about an eighth of the resolution in width


class TooSmall(UserError):
    """The picture would have to be enlarged."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FitRule:
    """Which size a picture becomes: `resolution` squared, or of `buckets` the one nearest in aspect.

    `upscale` permits enlarging.
    """

    resolution: int
    buckets: tuple[tuple[int, int], ...] = ()
    upscale: bool = False

    def size_for(self, width: int, height: int) -> tuple[int, int]:
        """Return the (width, height) in pixels that a picture of this size is to fill; raises `TooSmall`."""
        target = (self.resolution, self.resolution)
        if self.buckets:
            aspect = math.log(width / height)
            target = min(self.buckets, key=lambda size: abs(math.log(size[0] / size[1]) - aspect))
        if not self.upscale and (width < target[0] or height < target[1]):
            raise TooSmall(f"{width} x {height}, smaller than {target[0]} x {target[1]}")
        return target


def aspect_buckets(resolution: int) -> tuple[tuple[int, int], ...]:
    """Return (width, height) pairs from 1:4 to 4:1, sides multiples of 16, areas at most `resolution` squared and
    near it."""
    step = max(PIXELS_PER_TOKEN, resolution // _BUCKET_STEP // PIXELS_PER_TOKEN * PIXELS_PER_TOKEN)
    area = resolution * resolution
    wide = [
        (width, area // width // PIXELS_PER_TOKEN * PIXELS_PER_TOKEN)
        for width in range(resolution, 2 * resolution + 1, step)
    ]
    return tuple(sorted({*wide, *((height, width) for width, height in wide)}))


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What became of one source, as a line of the report says it."""

    source: str
    outcome: str
    reason: str | None = None
    name: str | None = None
    original: str | None = None
    size: tuple[int, int] | None = None
    processed: tuple[int, int] | None = None
    image: str | None = None

    def as_line(self) -> dict[str, Any]:
        """Return what is known, for JSON."""
        fields = {key: getattr(self, key) for key in self.__slots__}
        return {key: value for key, value in fields.items() if value is not None}


class Intake:
    """Takes sources into a prepared folder, one at a time; what is done already is left as it is."""

    def __init__(self, layout: Layout, *, rule: FitRule, originals: str, flag: str = "--image_folder") -> None:
        """`originals`: "move" and "copy" put them into `raw_images/`, "keep" leaves them where they are."""
        self.layout = layout
        self.rule = rule
        self.originals = originals
        self.flag = flag
        self._adopted: dict[str, str] = {}

    def take(self, source: Source) -> Outcome:
        """Process one source; returns what became of it, and why.

        Raises:
            UserError: an original can't be moved or copied.
        """
        problem = source.problem or self._obstacle(source)
        if problem is not None:
            return Outcome(source=source.relative, outcome=LEFT_OUT, reason=problem)
        try:
            name, notes = self._find_name(source)
            size = self._bytes_of(source)
            if notes is None:
                notes = self._process(source, name, size=size)
            elif notes.get("bytes", size) != size:
                reason = (
                    f"has changed since it became {name}; remove processed_images/{name}.png and what belongs to it"
                )
                return Outcome(source=source.relative, outcome=LEFT_OUT, reason=reason)
        except TooSmall as error:
            return Outcome(source=source.relative, outcome=TOO_SMALL, reason=str(error))
        except UserError as error:
            reason = str(error).removeprefix(f"{self.flag} {source.path}: ")
            return Outcome(source=source.relative, outcome=NOT_READ, reason=reason)
        return Outcome(
            source=source.relative,
            outcome=READY,
            name=name,
            original=str(self._keep_original(source).relative_to(self.layout.root)),
            size=notes.get("size"),
            processed=notes["processed"],
            image=notes.get("image"),
        )

    def _find_name(self, source: Source) -> tuple[str, dict[str, Any] | None]:
        """Return the source's name, and the notes of its processed picture if there is one.

        A picture without notes was put there by somebody else: it belongs to the first source that could have its
        name. Raises `UserError` if it can't be read.
        """
        free = None
        for place, name in enumerate(candidate_names(source.relative)):
            path = self._processed(name)
            if path is None:
                free = free or name
                if place > 0:
                    break
                continue
            notes = read_notes(path)
            if notes is not None and notes.get("source") == source.relative:
                return name, notes
            if notes is None and place == 0 and self._adopted.setdefault(name, source.relative) == source.relative:
                height, width = read_rgb(path, flag=self.flag).shape[-2:]
                return name, {"processed": (width, height), "image": str(path.relative_to(self.layout.root))}
        assert free is not None
        return free, None

    def _processed(self, name: str) -> Path | None:
        """Return the processed picture of a sample; others' may have other endings than ours."""
        ours = self.layout.image(name)
        return next((path for suffix in IMAGE_SUFFIXES if (path := ours.with_name(name + suffix)).exists()), None)

    def _obstacle(self, source: Source) -> str | None:
        """Say what is in the way of an original that is to be stored: the listing has missed it, or left it out."""
        if source.stored is None and not source.linked and self.originals != "keep":
            if os.path.lexists(self.layout.raw_images / source.relative):
                return f"{RAW_IMAGES}/ holds something else of this path; rename this one"
        return None

    def _bytes_of(self, source: Source) -> int:
        try:
            return source.path.stat().st_size
        except OSError as error:  # taken away since it was listed
            raise UserError(f"{self.flag} {source.path}: can't be read ({error.strerror})") from None

    def _process(self, source: Source, name: str, *, size: int) -> dict[str, Any]:
        fitted = read_fitted(source.path, size_for=self.rule.size_for, flag=self.flag)
        height, width, _ = fitted.rgb_hw3.shape
        notes = {
            "source": source.relative,
            "bytes": size,
            "size": (fitted.width, fitted.height),
            "processed": (width, height),
        }
        write_noted_png(self.layout.image(name), fitted.rgb_hw3, notes)
        return notes

    def _keep_original(self, source: Source) -> Path:
        """Put the original where it is to be, and return its place."""
        stored = self.layout.raw_images / source.relative
        if source.fresh is None:
            return stored
        if source.linked or self.originals == "keep":
            return source.fresh
        try:
            stored.parent.mkdir(parents=True, exist_ok=True)
            if self.originals == "copy":
                if source.stored is None:
                    _copy(source.fresh, stored)
            elif source.stored is None:
                _move(source.fresh, stored)
            elif filecmp.cmp(source.fresh, stored, shallow=False):  # both there and equal: a move that was cut short
                source.fresh.unlink()
        except OSError as error:
            verb = "moved" if self.originals == "move" else "copied"
            raise UserError(
                f"--originals {self.originals}: {source.fresh} can't be {verb} to {stored} ({error.strerror}); "
                "mend that, or use --originals keep"
            ) from None
        return stored


def _copy(source: Path, target: Path) -> None:
    """Copy a file with its times and permissions, whole or not at all."""
    temporary = target.with_name(f".copy.{os.getpid()}.tmp")  # the file's own name may be as long as names can be
    try:
        shutil.copy2(source, temporary)
        flush_to_disk(temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _move(source: Path, target: Path) -> None:
    try:
        source.rename(target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        _copy(source, target)
        source.unlink()
