"""Curves as a small picture, drawn with Pillow alone: lines with markers over a logarithmic or linear axis."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

SCALE = 2  # drawn larger and scaled down, which smooths lines
WIDTH, HEIGHT = 480, 320
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 34, 46
INK, GRID = (40, 40, 40), (224, 224, 224)
COLORS = ((31, 95, 170), (208, 92, 20), (40, 130, 70), (150, 50, 120))

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Plot:
    """One set of axes: curves by their name, each a row of (x, y); `log` spaces x by its logarithm."""

    title: str
    x_label: str
    curves: Mapping[str, Points]
    log: bool = True

    def __post_init__(self) -> None:
        if not any(self.curves.values()):
            raise ValueError(f"the plot {self.title!r} has no points")


def draw(plots: Sequence[Plot]) -> Image.Image:
    """Return the plots side by side, two in a row, on white."""
    rows = math.ceil(len(plots) / 2)
    sheet = Image.new("RGB", (WIDTH * min(2, len(plots)), HEIGHT * rows), "white")
    for number, plot in enumerate(plots):
        sheet.paste(_draw_one(plot), (WIDTH * (number % 2), HEIGHT * (number // 2)))
    return sheet


def _draw_one(plot: Plot) -> Image.Image:
    picture = Image.new("RGB", (WIDTH * SCALE, HEIGHT * SCALE), "white")
    pen = ImageDraw.Draw(picture)
    font = ImageFont.load_default(12 * SCALE)
    xs = sorted({x for points in plot.curves.values() for x, _ in points})
    ticks = nice_ticks([y for points in plot.curves.values() for _, y in points])

    def place(x: float, y: float) -> tuple[float, float]:
        across, low, high = (math.log(v) if plot.log else v for v in (x, xs[0], xs[-1]))
        share = (across - low) / (high - low) if high > low else 0.5
        rise = (y - ticks[0]) / (ticks[-1] - ticks[0])
        return (
            SCALE * (LEFT + share * (WIDTH - LEFT - RIGHT)),
            SCALE * (HEIGHT - BOTTOM - rise * (HEIGHT - TOP - BOTTOM)),
        )

    for y in ticks:
        pen.line([place(xs[0], y), place(xs[-1], y)], fill=GRID, width=SCALE)
        pen.text((SCALE * (LEFT - 6), place(xs[0], y)[1]), f"{y:g}", fill=INK, font=font, anchor="rm")
    free = 0.0  # where the next label may begin
    for x in xs:
        text, half = f"{x:g}", pen.textlength(f"{x:g}", font=font) / 2
        middle = min(place(x, ticks[0])[0], SCALE * WIDTH - half - SCALE)
        if middle - half >= free:
            pen.text((middle, SCALE * (HEIGHT - BOTTOM + 6)), text, fill=INK, font=font, anchor="mt")
            free = middle + half + 6 * SCALE
    pen.text((SCALE * WIDTH / 2, SCALE * (HEIGHT - 6)), plot.x_label, fill=INK, font=font, anchor="mb")
    pen.text((SCALE * LEFT, SCALE * 4), plot.title, fill=INK, font=font, anchor="lt")
    at = float(SCALE * LEFT)
    for (name, points), color in zip(plot.curves.items(), COLORS, strict=False):
        line = [place(x, y) for x, y in sorted(points)]
        pen.line(line, fill=color, width=2 * SCALE)
        for x, y in line:
            pen.ellipse([x - 3 * SCALE, y - 3 * SCALE, x + 3 * SCALE, y + 3 * SCALE], fill=color)
        pen.text((at, SCALE * 19), name, fill=color, font=font, anchor="lt")
        at += pen.textlength(name, font=font) + 14 * SCALE
    return picture.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)


def nice_ticks(values: Sequence[float], *, most: int = 6) -> list[float]:
    """Return rising round numbers, at least two and about `most`, from 0 or below the values to above them."""
    low, high = min(0.0, *values), max(values)
    rough = max(high - low, 1e-6) / most
    unit = 10 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, max(last, first + 1) + 1)]
