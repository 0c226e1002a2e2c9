"""The two stages that give ready pictures their depth maps and captions, from networks or from the user's files."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from dataset.annotators.groups import group_by, write_group
from dataset.layout import Layout
from library.errors import UserError
from library.files import read_lines, write_text
from library.images import fit_depth, read_depth, read_rgb, write_depth_npy

NO_DEPTH, NO_CAPTION = "no depth map", "no caption"
_DEPTH_SUFFIXES = (".npy", ".exr", ".png", ".tif", ".tiff")
_SAME_ASPECT = 0.01  # relative; a map that was scaled down has rounded sides

Line = dict[str, Any]


class DepthSource(Protocol):
    """A network that gives disparity."""

    def estimate(self, rgb_B3hw: Tensor) -> Tensor:
        """Return (B, h, w) disparity."""
        ...


class CaptionSource(Protocol):
    """A network that describes pictures."""

    def describe(self, pictures: list[np.ndarray]) -> list[list[str]]:
        """Return the captions of each picture."""
        ...


def estimate_depth(
    layout: Layout, samples: Iterable[Line], *, network: Callable[[], DepthSource], batch_size: int
) -> Iterator[tuple[int, list[Line]]]:
    """Make the depth maps that are missing; yields how many samples are done, and the problems among them.

    `samples` are the report's lines of ready pictures. `network` is called when the first map is to be made.
    """
    for group in group_by(samples, size=batch_size, key=lambda line: tuple(line["processed"])):
        yield len(group), _estimate_group(layout, group, network)


def _estimate_group(layout: Layout, group: list[Line], network: Callable[[], DepthSource]) -> list[Line]:
    """Make one group's maps; all are estimated, so that a half-finished group gives the same, and the missing kept."""
    missing = {line["name"] for line in group if not layout.depthmap(line["name"]).exists()}
    if not missing:
        return []
    pictures, problems = _read_pictures(layout, group, NO_DEPTH)
    files = {}
    if pictures:
        maps_Bhw = network().estimate(torch.stack(list(pictures.values())))
        for name, map_hw in zip(pictures, maps_Bhw, strict=True):
            if not torch.isfinite(map_hw).all() or map_hw.min() == map_hw.max():
                problems.append(_problem(name, NO_DEPTH, "the network gives one value everywhere, or none"))
            elif name in missing:
                files[f"{name}.npy"] = partial(write_depth_npy, disparity_hw=map_hw)
    write_group(layout.depthmaps, files)
    return problems


def import_depth(
    layout: Layout, samples: Iterable[Line], *, folder: Path, kind: str
) -> Iterator[tuple[int, list[Line]]]:
    """Take the user's depth maps for those that lack one; yields as `estimate_depth` does."""
    for line in samples:
        yield 1, [] if layout.depthmap(line["name"]).exists() else _import_one(layout, line, folder, kind)


def _import_one(layout: Layout, line: Line, folder: Path, kind: str) -> list[Line]:
    name = line["name"]
    found = _partner(line, folder, _DEPTH_SUFFIXES)
    if found is None:
        return [_problem(name, NO_DEPTH, f"--depth_from {folder}: holds none for {line['source']}")]
    try:
        disparity_hw = read_depth(found, kind=kind, flag="--depth_from")
    except UserError as error:
        return [_problem(name, NO_DEPTH, str(error))]
    height, width = disparity_hw.shape
    to_width, to_height = line["processed"]
    if (width, height) != (to_width, to_height):
        of_width, of_height = line["size"] if "size" in line else line["processed"]
        if abs(width * of_height / (height * of_width) - 1) > _SAME_ASPECT:
            reason = f"--depth_from {found}: is {width} x {height}, its picture {of_width} x {of_height}"
            return [_problem(name, NO_DEPTH, f"{reason}; give it the same aspect")]
        disparity_hw = fit_depth(disparity_hw, width=to_width, height=to_height)
    write_depth_npy(layout.depthmap(name), disparity_hw)
    return []


def describe_pictures(
    layout: Layout, samples: Iterable[Line], *, network: Callable[[], CaptionSource], batch_size: int
) -> Iterator[tuple[int, list[Line]]]:
    """Write the captions that are missing, one a line; yields as `estimate_depth` does."""
    for group in group_by(samples, size=batch_size, key=lambda line: None):
        missing = [line for line in group if not layout.prompt(line["name"]).exists()]
        yield len(group), _describe_group(layout, missing, network) if missing else []


def _describe_group(layout: Layout, missing: list[Line], network: Callable[[], CaptionSource]) -> list[Line]:
    """Describe those without captions: captions that others wrote aren't made again, which would take long."""
    pictures, problems = _read_pictures(layout, missing, NO_CAPTION)
    files = {}
    if pictures:
        arrays = [(rgb_3hw * 255).round().to(torch.uint8).permute(1, 2, 0).numpy() for rgb_3hw in pictures.values()]
        for name, captions in zip(pictures, network().describe(arrays), strict=True):
            if captions:
                files[f"{name}.txt"] = partial(write_text, text="\n".join(captions) + "\n")
            else:
                problems.append(_problem(name, NO_CAPTION, "the network said nothing"))
    write_group(layout.text_prompts, files)
    return problems


def import_captions(layout: Layout, samples: Iterable[Line], *, folder: Path) -> Iterator[tuple[int, list[Line]]]:
    """Copy the user's captions for those that lack one; yields as `estimate_depth` does."""
    for line in samples:
        yield 1, [] if layout.prompt(line["name"]).exists() else _import_caption(layout, line, folder)


def _import_caption(layout: Layout, line: Line, folder: Path) -> list[Line]:
    name = line["name"]
    found = _partner(line, folder, (".txt",))
    if found is None:
        return [_problem(name, NO_CAPTION, f"--captions_from {folder}: holds none for {line['source']}")]
    try:
        captions = read_lines(found)
    except (OSError, UnicodeDecodeError) as error:
        return [_problem(name, NO_CAPTION, f"--captions_from {found}: can't be read as UTF-8 text ({error})")]
    if not captions:
        return [_problem(name, NO_CAPTION, f"--captions_from {found}: is empty")]
    write_text(layout.prompt(name), "\n".join(captions) + "\n")
    return []


def _partner(line: Line, folder: Path, suffixes: tuple[str, ...]) -> Path | None:
    """Find the user's file for a picture: at the picture's own path below `folder`, or under the sample's name."""
    places = (folder / line["source"]).with_suffix(""), folder / line["name"]
    candidates = (place.with_name(place.name + suffix) for place in places for suffix in suffixes)
    return next((path for path in candidates if path.is_file()), None)


def _read_pictures(layout: Layout, lines: list[Line], outcome: str) -> tuple[dict[str, Tensor], list[Line]]:
    pictures, problems = {}, []
    for line in lines:
        path = Path(layout.root, line["image"]) if "image" in line else layout.image(line["name"])
        try:
            pictures[line["name"]] = read_rgb(path, flag="--image_folder")
        except UserError as error:
            problems.append(_problem(line["name"], outcome, str(error)))
    return pictures, problems


def _problem(name: str, outcome: str, reason: str) -> Line:
    return {"name": name, "outcome": outcome, "reason": reason}
