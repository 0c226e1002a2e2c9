"""Make the README's pictures from what scripts/demo.sh left: one strip per task.

python scripts/readme_pictures.py
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from demo_page import HEADINGS, Exhibit, read_exhibits
from torch import Tensor
from torch.nn import functional

from library.args import Flags, flag, parse
from library.cli import run_main, say
from library.images import write_rgb

GAP = 8  # pixels between the pictures of one result
SPACE = 40  # pixels between results


@dataclass(frozen=True, kw_only=True)
class PicturesArgs(Flags):
    """README pictures."""

    folder: Path = flag(Path("outputs/demo"), help="results of scripts/demo.sh", metavar="FOLDER")
    output: Path = flag(Path("assets/readme"), help="where TASK.png go", metavar="FOLDER")
    side: int = flag(192, help="height of a picture in the strip, in pixels", minimum=16)
    count: int = flag(3, help="results in one strip", minimum=1)


def strip(exhibits: list[Exhibit], *, side: int) -> Tensor:
    """Return the given and made pictures of these results in one row on white, (3, side, w) in [0, 1]."""
    columns: list[Tensor] = []
    for exhibit in exhibits:
        shown = [picture for picture in exhibit.pictures if picture.kind != "truth"]
        for place, picture in enumerate(shown):
            if columns:
                columns.append(torch.ones(3, side, GAP if place else SPACE))
            columns.append(_at_height(picture.rgb_3hw, side))
    return torch.cat(columns, dim=2)


def _at_height(rgb_3hw: Tensor, side: int) -> Tensor:
    """Return a picture resized to `side` rows, its proportions kept."""
    height, width = rgb_3hw.shape[-2:]
    size = (side, round(width * side / height))
    return functional.interpolate(rgb_3hw[None], size=size, mode="bicubic", antialias=True)[0].clamp(0, 1)


def main() -> None:
    """Read the flags and write one strip per task."""
    args = parse(sys.argv[1:], PicturesArgs, description="Make the README's pictures.")
    exhibits = read_exhibits(args.folder)
    for task in HEADINGS:
        chosen = [exhibit for exhibit in exhibits if exhibit.task == task][: args.count]
        if chosen:
            write_rgb(args.output / f"{task}.png", strip(chosen, side=args.side))
            say(f"{args.output / task}.png: {len(chosen)} results")


if __name__ == "__main__":
    run_main(main)
