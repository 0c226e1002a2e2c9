"""Measure the embedded model on held-out synthetic scenes: python scripts/evaluate_tiny.py --scenes 256 --json FILE.

The scenes are rendered on the fly and no training set has them. What each measure is stands in
library/evaluation/embedded.py.
"""

import json
import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dataset.evaluation_scenes import RENDER_WORK, baseline_scenes, evaluation_setting, statistics_file
from dataset.synthetic import GENERATOR_VERSION, HELD_OUT_SEED
from library.args import DEVICES, Flags, find_device, flag, parse
from library.cli import run_main, say, set_threads
from library.errors import UserError
from library.evaluation.embedded import GROUPS, measure, work
from library.evaluation.generation import load_batched_model
from library.evaluation.progress import Progress
from library.evaluation.report import compared, figures_of, markdown_table, missed, text_table
from library.files import write_json, write_text
from library.fingerprint import fingerprints
from library.results import machine
from library.weight_paths import embedded_files, find_addons
from library.writable import require_writable, writing

# What makes two results comparable.
SETTINGS = ("scenes", "training_scenes", "steps", "depth_steps", "guidance", "generator_version", "size")
BASELINES = {"set", "autoencoder"}  # groups of measures with baselines from training scenes


@dataclass(frozen=True, kw_only=True)
class EvaluateArgs(Flags):
    """Evaluation of the embedded model."""

    scenes: int = flag(256, help="held-out scenes", minimum=2)
    json: Path | None = flag(None, help="write all figures to this file", metavar="FILE")
    markdown: Path | None = flag(None, help="write the table to this file in Markdown", metavar="FILE")
    compare: Path | None = flag(None, help="an earlier --json FILE to print the figures against", metavar="FILE")
    model_folder: Path | None = flag(
        None, help="folder with the embedded model's file names (otherwise assets/tiny)", metavar="FOLDER"
    )
    jointdit_addons_path: Path | None = flag(
        None, help="other add-ons than that folder's, or their folder", metavar="PATH"
    )
    measures: tuple[str, ...] = flag(tuple(GROUPS), help="groups of measures to make", choices=tuple(GROUPS))
    batch: int = flag(32, help="samples at a time", minimum=1)
    steps: int = flag(12, help="steps of joint generation and depth to image", minimum=1)
    depth_steps: int = flag(8, help="steps of depth estimation", minimum=1)
    training_scenes: int = flag(
        0,
        help="training scenes behind the mean map and the linear PCA; 0 is 16 for each held-out one, at most 2000",
        minimum=0,
    )
    size: int = flag(128, help="side of the pictures in pixels, a multiple of 16", minimum=32)
    num_threads: int = flag(0, help="CPU threads; 0 takes the cores this process may use", minimum=0)
    device: str = flag("cpu", help="where the model computes; auto takes CUDA, then MPS", choices=DEVICES)
    strict: bool = flag(False, help="exit with status 1 when a measure misses its bound")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size % 16:
            raise UserError(f"--size {self.size}: must be a multiple of 16")

    def outputs(self) -> list[tuple[str, Path]]:
        """Return the files to write, each with its flag."""
        return [(name, path) for name in ("json", "markdown") if (path := getattr(self, name)) is not None]


def main() -> None:
    """Read the flags, render, measure, print and write."""
    args = parse(sys.argv[1:], EvaluateArgs, description=__doc__)
    device = find_device(args.device)
    threads = set_threads(args.num_threads)
    for name, path in args.outputs():
        require_writable(path, told=f"--{name} {path}")
    earlier = read_figures(args.compare) if args.compare else {}
    paths = embedded_files(folder=args.model_folder)
    if args.jointdit_addons_path is not None:
        paths |= {"jointdit_addons_path": find_addons(args.jointdit_addons_path)}
    training_scenes = args.training_scenes or (baseline_scenes(args.scenes) if BASELINES & set(args.measures) else 1)
    cached = statistics_file(training_scenes, args.size)
    rendered = args.scenes + (0 if cached.exists() else training_scenes)
    size_of_work = work(args.measures, scenes=args.scenes, steps=args.steps, depth_steps=args.depth_steps)
    progress = Progress(total=size_of_work + RENDER_WORK * rendered)
    weights = fingerprints(paths)
    model = load_batched_model(paths, progress=progress, batch=args.batch, size=args.size, device=device)
    started = time.perf_counter()
    setting = evaluation_setting(
        model,
        scenes=args.scenes,
        training_scenes=training_scenes,
        size=args.size,
        progress=progress,
        steps=args.steps,
        depth_steps=args.depth_steps,
    )
    values = measure(setting, args.measures)
    say(text_table(values))
    facts = {
        "scenes": args.scenes,
        "held_out_seed": HELD_OUT_SEED,
        "generator_version": GENERATOR_VERSION,
        "training_scenes": training_scenes,
        "size": args.size,
        "steps": args.steps,
        "depth_steps": args.depth_steps,
        "guidance": model.guidance if model.model.config.guidance_embed else None,
        "measures": list(args.measures),
        "weights": weights,
        "alignment": "affine_disparity",
        "device": device.type,
        "machine": machine(),
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}",
        "threads": threads,
        "seconds": round(time.perf_counter() - started, 1),
    }
    say(
        f"{args.scenes} held-out scenes of generator version {GENERATOR_VERSION}, "
        f"{threads} thread(s), {facts['seconds']} s"
    )
    finish(args, values, facts, earlier)


def finish(args: EvaluateArgs, values: dict[str, float], facts: dict, earlier: dict[str, Any]) -> None:
    """Write what was asked for, print the comparison, and fail for missed bounds if told to."""
    if args.json:
        with writing(f"--json {args.json}"):
            write_json(args.json, facts | values | {"missed": missed(values)})
        say(f"figures: {args.json}")
    if args.markdown:
        with writing(f"--markdown {args.markdown}"):
            write_text(args.markdown, markdown_table(values) + "\n")
        say(f"table: {args.markdown}")
    if earlier:
        changed = [
            f"{name} {earlier.get(name)} -> {facts[name]}" for name in SETTINGS if earlier.get(name) != facts[name]
        ]
        if changed:
            say(f"compared under other settings: {', '.join(changed)}")
        say(compared(values, figures_of(earlier)) or f"--compare {args.compare}: has none of these measures")
    if args.strict and missed(values):
        sys.exit(1)


def read_figures(path: Path) -> dict[str, Any]:
    """Read an earlier result."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--compare {path}: can't be read as a result of this command ({error})") from None
    if not figures_of(result):
        raise UserError(f"--compare {path}: holds no figures of this command; give a file that --json wrote")
    return result


if __name__ == "__main__":
    run_main(main)
