"""Build one self-contained page of what inference.py made: inputs and results side by side.

python scripts/demo_page.py --folder outputs/demo [--truth assets/demo]
"""

import base64
import html
import io
import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.args import Flags, flag, parse
from library.cli import run_main, say
from library.errors import UserError
from library.files import write_text
from library.flags import command_words
from library.images import colorize, read_depth, read_rgb, to_picture
from library.inference_args import InferenceArgs
from library.modality import normalize_disparity

TEMPLATE = Path(__file__).with_suffix(".html")
HEADINGS = {
    "depth_estimation": ("An image becomes its depth", "The image is held fixed and the depth starts from noise."),
    "joint_generation": (
        "A sentence becomes an image with its depth",
        "Both start from noise and listen to one another.",
    ),
    "depth_to_image": ("A depth map becomes an image", "The depth is held fixed and the image starts from noise."),
}

_NOT_THE_RESULTS = ("seed", "output_dir", "output_name")  # flags of the whole command, not of each result


@dataclass(frozen=True, kw_only=True)
class PageArgs(Flags):
    """The page."""

    folder: Path = flag(Path("outputs/demo"), help="where the results lie, and index.html goes", metavar="FOLDER")
    truth: Path | None = flag(
        None, help="folder with depth_X.npy, the true disparity of each image_X.png, shown beside", metavar="FOLDER"
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """One picture on the page: `rgb_3hw` in [0, 1], and `kind`, "given", "made" or "truth", which chooses its frame."""

    label: str
    rgb_3hw: Tensor
    kind: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Exhibit:
    """One result with what it was made from."""

    task: str
    caption: str
    pictures: list[Picture]
    command: str


def read_exhibits(folder: Path, *, truth: Path | None = None) -> list[Exhibit]:
    """Read all results under a folder, tasks in the order of `HEADINGS`, then by file name.

    Raises `UserError` when there is none, and for files that can't be read.
    """
    records = sorted(path for task in HEADINGS for path in (folder / task).glob("*.json"))
    if not records:
        raise UserError(f"--folder {folder}: holds no results; run scripts/demo.sh")
    exhibits = [_read_exhibit(path, truth=truth) for path in records]
    return sorted(exhibits, key=lambda exhibit: list(HEADINGS).index(exhibit.task))


def page(exhibits: list[Exhibit]) -> str:
    """Return the page as HTML; pictures are inside it, and nothing is loaded from elsewhere."""
    sections = []
    for task, (title, text) in HEADINGS.items():
        cards = "\n".join(_card(exhibit) for exhibit in exhibits if exhibit.task == task)
        if cards:
            sections.append(f"<section><h2>{title}</h2><p>{text}</p>\n<div class=cards>{cards}</div></section>")
    template = TEMPLATE.read_text(encoding="utf-8")
    return template.replace("{{scale}}", _scale()).replace("{{sections}}", "\n".join(sections))


def _read_exhibit(path: Path, *, truth: Path | None) -> Exhibit:
    record = _read_record(path)
    task, image, depth = record["task"], record.get("input_image"), record.get("input_depth")
    input_flag = f"--folder {path}: its input"
    made_rgb = Picture(label="image", rgb_3hw=read_rgb(path.with_suffix(".png"), flag="--folder"), kind="made")
    depth_path = path.with_name(f"{path.stem}_depth.npy")
    made_depth = Picture(label="depth", rgb_3hw=_colors(depth_path, flag="--folder"), kind="made")
    if image is not None:
        pictures = [Picture(label="given: image", rgb_3hw=read_rgb(image, flag=input_flag), kind="given"), made_depth]
        known = truth / Path(image).with_suffix(".npy").name.replace("image", "depth") if truth else None
        if known and known.exists():
            pictures.append(Picture(label="true depth", rgb_3hw=_colors(known, flag="--truth"), kind="truth"))
    elif depth is not None:
        given = _colors(Path(depth), flag=input_flag, kind=record["flags"].get("depth_kind", "disparity"))
        pictures = [Picture(label="given: depth", rgb_3hw=given, kind="given"), made_rgb]
    else:
        pictures = [made_rgb, made_depth]
    caption = record["prompt"].strip() or Path(image or depth or path).name
    return Exhibit(task=task, caption=caption, pictures=pictures, command=_command(record))


def _read_record(path: Path) -> dict[str, Any]:
    """Read what made one result; raise `UserError` for a file that doesn't say so."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        types = {"task": str, "prompt": str, "seed": int, "flags": dict}
        whole = all(isinstance(record[name], kind) for name, kind in types.items()) and record["task"] in HEADINGS
    except (OSError, ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise UserError(f"--folder {path}: isn't what inference.py says of a result; delete it, or make that again")
    return record


def _command(record: dict[str, Any]) -> str:
    """Return the command line that makes this result again, with this seed alone, wherever it shall go."""
    values = {name: value for name, value in record["flags"].items() if name not in _NOT_THE_RESULTS}
    words = command_words(values, InferenceArgs)
    return shlex.join(["python", "inference.py", *words, "--seed", str(record["seed"])])


def _colors(path: Path, *, flag: str, kind: str = "disparity") -> Tensor:
    """Return a depth file as colours (3, h, w), stretched to its own range; one colour for a constant map."""
    return colorize(normalize_disparity(read_depth(path, kind=kind, flag=flag, may_be_flat=True)))


def _data_uri(rgb_3hw: Tensor) -> str:
    buffer = io.BytesIO()
    to_picture(rgb_3hw).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _card(exhibit: Exhibit) -> str:
    figures = []
    for picture in exhibit.pictures:
        height, width = picture.rgb_3hw.shape[-2:]
        label = html.escape(picture.label)
        figures.append(
            f'<figure class={picture.kind}><img src="{_data_uri(picture.rgb_3hw)}" width={width} height={height} '
            f'alt="{label}: {html.escape(exhibit.caption, quote=True)}"><figcaption>{label}</figcaption></figure>'
        )
    return (
        f"<article><div class=row>{''.join(figures)}</div><h3>{html.escape(exhibit.caption)}</h3>"
        f"<details><summary>made by</summary><code>{html.escape(exhibit.command)}</code></details></article>"
    )


def _scale() -> str:
    """Return the colour scale, far to near."""
    ramp = colorize(torch.linspace(0, 1, 256)[None])
    return f'<span class=scale>far <img src="{_data_uri(ramp)}" alt="colours from far to near"> near</span>'


def main() -> None:
    """Read the flags, write the page and say where it is."""
    args = parse(sys.argv[1:], PageArgs, description="Build the demo's page.")
    path = args.folder / "index.html"
    write_text(path, page(read_exhibits(args.folder, truth=args.truth)))
    say(f"Look at {path.resolve()}")


if __name__ == "__main__":
    run_main(main)
