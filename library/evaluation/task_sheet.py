"""A picture of all three tasks on the same scenes, one scene a row: what is given, what is made, what is true.

Shapes: h w pixels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from library.images import colorize, to_picture

CELL = 128  # side of a picture in pixels
MARGIN, GAP, SPACE = 20, 6, 26  # at the edges, between pictures of one task, between tasks (and between scenes)
CAPTION_SIZE, HEADING_SIZE, LABEL_SIZE = 14, 18, 13
HEAD = MARGIN + HEADING_SIZE + LABEL_SIZE + 34  # down to the first caption
INK, SOFT, RULE, PAPER = (24, 24, 24), (105, 105, 105), (200, 200, 200), (255, 255, 255)
LINE = 20  # of captions and note
SCALE_WIDTH = 230  # kept for the colour scale, right of the note

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
Color = tuple[int, int, int]

# Headings of the tasks, each with its columns: the name in `SheetScene`'s pictures and what stands above it.
GROUPS: dict[str, dict[str, str]] = {
    "Caption to image and depth": {"joint_rgb": "image", "joint_depth": "depth"},
    "Image to depth": {"true_rgb": "given image", "estimated_depth": "estimated depth", "true_depth": "true depth"},
    "Depth and caption to image": {"given_depth": "given depth", "made_rgb": "image"},
}


@dataclass(frozen=True, kw_only=True, slots=True)
class SheetScene:
    """One row: the caption, and by the names in `GROUPS` colours (3, h, w) or disparity (h, w), each in [0, 1]."""

    caption: str
    pictures: Mapping[str, Tensor]


def draw_sheet(scenes: Sequence[SheetScene], *, note: str) -> Image.Image:
    """Return the scenes one below the other on white, with headings above and `note` and the colour scale below."""
    lefts, width = _columns()
    font, small = ImageFont.load_default(CAPTION_SIZE), ImageFont.load_default(LABEL_SIZE)
    captions = [wrap(scene.caption, font=font, width=width - 2 * MARGIN) for scene in scenes]
    notes = wrap(note, font=small, width=width - 2 * MARGIN - SCALE_WIDTH)
    tops = list(accumulate((LINE * len(lines) + CELL + SPACE for lines in captions), initial=HEAD))
    sheet = Image.new("RGB", (width, tops[-1] + LINE * len(notes) + MARGIN), PAPER)
    pen = ImageDraw.Draw(sheet)
    _draw_headings(pen, lefts)
    for scene, lines, top in zip(scenes, captions, tops, strict=False):
        _draw_lines(pen, lines, top=top, font=font, fill=INK)
        for name, left in lefts.items():
            sheet.paste(_tile(scene.pictures[name]), (left, top + LINE * len(lines)))
    _draw_lines(pen, notes, top=tops[-1], font=small, fill=SOFT)
    _draw_scale(sheet, pen, right=width - MARGIN, top=tops[-1], font=small)
    return sheet


def wrap(text: str, *, font: Font, width: int) -> list[str]:
    """Return the text in lines that are at most `width` pixels long; a longer word has a line of its own."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def _columns() -> tuple[dict[str, int], int]:
    """Return each column's left edge, and the sheet's width."""
    names = [name for columns in GROUPS.values() for name in columns]
    ends = set(accumulate(len(columns) for columns in GROUPS.values()))
    lefts, at = {}, MARGIN
    for number, name in enumerate(names, start=1):
        lefts[name] = at
        at += CELL + (SPACE if number in ends else GAP)
    return lefts, at - SPACE + MARGIN


def _draw_headings(pen: ImageDraw.ImageDraw, lefts: Mapping[str, int]) -> None:
    heading, label = ImageFont.load_default(HEADING_SIZE), ImageFont.load_default(LABEL_SIZE)
    for title, columns in GROUPS.items():
        edges = [lefts[name] for name in columns]
        left, right = edges[0], edges[-1] + CELL
        pen.text((left, MARGIN), title, fill=INK, font=heading, anchor="lt")
        rule = MARGIN + HEADING_SIZE + 5
        pen.line([(left, rule), (right - 1, rule)], fill=RULE, width=1)
        for edge, text in zip(edges, columns.values(), strict=True):
            pen.text((edge + CELL / 2, rule + 7), text, fill=SOFT, font=label, anchor="mt")


def _draw_lines(pen: ImageDraw.ImageDraw, lines: Sequence[str], *, top: int, font: Font, fill: Color) -> None:
    for place, line in enumerate(lines):
        pen.text((MARGIN, top + place * LINE), line, fill=fill, font=font)


def _draw_scale(sheet: Image.Image, pen: ImageDraw.ImageDraw, *, right: int, top: int, font: Font) -> None:
    """Draw the colours of depth from far to near, ending at `right`."""
    pen.text((right, top), "near", fill=SOFT, font=font, anchor="ra")
    right -= round(font.getlength("near")) + 8
    sheet.paste(_tile(torch.linspace(0, 1, CELL).expand(12, CELL)), (right - CELL, top + 2))
    pen.text((right - CELL - 8, top), "far", fill=SOFT, font=font, anchor="ra")


def _tile(values: Tensor) -> Image.Image:
    """Return colours as they are, a disparity map in colours."""
    return to_picture(colorize(values) if values.dim() == 2 else values)
