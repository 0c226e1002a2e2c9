"""A picture of some samples to look at: image, depth and caption side by side."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from library.files import write_atomically
from library.images import colorize, to_picture
from library.modality import normalize_disparity

_TILE, _TEXT, _GAP = 192, 300, 8
_LINES, _COLUMNS = 10, 44
_FONT_SIZE = 13
_PAPER, _INK, _NAME = (255, 255, 255), (20, 20, 20), (120, 120, 120)


@dataclass(frozen=True, kw_only=True, slots=True)
class SheetRow:
    """One sample: colours (3, h, w) in [0, 1] and disparity (h, w) of any scale; None leaves its place empty."""

    name: str
    caption: str
    rgb_3hw: Tensor | None = None
    disparity_hw: Tensor | None = None


def write_contact_sheet(path: Path, rows: Sequence[SheetRow], *, columns: int = 2) -> None:
    """Write the sheet as a PNG, atomically: `columns` samples side by side, near depth light."""
    width, height = 2 * _TILE + _TEXT + 4 * _GAP, _TILE + _GAP
    lines = -(-len(rows) // columns)
    sheet = Image.new("RGB", (columns * width + _GAP, lines * height + _GAP), _PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(_FONT_SIZE)
    for number, row in enumerate(rows):
        line, column = divmod(number, columns)
        left, top = _GAP + column * width, _GAP + line * height
        if row.rgb_3hw is not None:
            _paste(sheet, row.rgb_3hw, left, top)
        if row.disparity_hw is not None:
            _paste(sheet, colorize(normalize_disparity(row.disparity_hw)), left + _TILE + _GAP, top)
        text_left = left + 2 * (_TILE + _GAP)
        draw.text((text_left, top), row.name, fill=_NAME, font=font)
        text = "\n".join(textwrap.wrap(row.caption, _COLUMNS, max_lines=_LINES, placeholder=" ..."))
        draw.multiline_text((text_left, top + _FONT_SIZE + 6), text, fill=_INK, font=font, spacing=3)
    with write_atomically(path) as temporary:
        sheet.save(temporary)


def _paste(sheet: Image.Image, rgb_3hw: Tensor, left: int, top: int) -> None:
    tile = to_picture(rgb_3hw)
    tile.thumbnail((_TILE, _TILE), Image.Resampling.LANCZOS)
    if max(tile.size) < _TILE:  # small pictures are enlarged as they are
        scale = _TILE / max(tile.size)
        size = max(1, round(tile.width * scale)), max(1, round(tile.height * scale))
        tile = tile.resize(size, Image.Resampling.NEAREST)
    sheet.paste(tile, (left + (_TILE - tile.width) // 2, top + (_TILE - tile.height) // 2))
