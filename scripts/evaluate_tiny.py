"""Measure the embedded model on held-out synthetic scenes: python scripts/evaluate_tiny.py --scenes 256 --json FILE.

The scenes are rendered on the fly and no training set has them. What each measure is stands in
library/evaluation/embedded.py.
"""

import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from dataset.synthetic import GENERATOR_VERSION, HELD_OUT_SEED, SceneBatch, render_batch
from dataset.synthetic.palette import PALETTE, nearest_colour
from library.args import Flags, flag, parse
from library.cli import run_main, say, set_threads
from library.errors import UserError
from library.evaluation.baselines import PatchPCA, PatchStatistics
from library.evaluation.colors import ColorFinder, Palette
from library.evaluation.embedded import GROUPS, Setting, measure, work
from library.evaluation.generation import load_batched_model
from library.evaluation.progress import Progress
from library.evaluation.report import compared, markdown_table, missed, text_table
from library.evaluation.scene_set import SceneSet, SeenObject
from library.files import save_tensors, write_json, write_text
from library.modality import normalize_disparity
from library.weight_paths import embedded_files

TRAINING_SEED = 0
RENDERED_AT_ONCE = 32
RENDER_WORK = 3.0  # one scene, told in transformer calls, for the time left


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
    device: str = flag("cpu", help="where the model computes, such as cpu or cuda")
    strict: bool = flag(False, help="exit with status 1 when a measure misses its bound")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size % 16:
            raise UserError(f"--size {self.size}: must be a multiple of 16")


def main() -> None:
    """Read the flags, render, measure, print and write."""
    args = parse(sys.argv[1:], EvaluateArgs, description=__doc__)
    threads = set_threads(args.num_threads)
    earlier = read_figures(args.compare) if args.compare else {}
    paths = embedded_files(folder=args.model_folder)
    training_scenes = args.training_scenes or min(2000, 16 * args.scenes)
    cached = statistics_file(training_scenes, args.size)
    rendered = args.scenes + (0 if cached.exists() else training_scenes)
    size_of_work = work(args.measures, scenes=args.scenes, steps=args.steps, depth_steps=args.depth_steps)
    progress = Progress(total=size_of_work + RENDER_WORK * rendered)
    model = load_batched_model(
        paths, progress=progress, batch=args.batch, size=args.size, device=torch.device(args.device)
    )
    started = time.perf_counter()
    pca, mean_map_hw = training_statistics(training_scenes, size=args.size, progress=progress)
    setting = Setting(
        scenes=held_out_scenes(args.scenes, size=args.size, mean_map_hw=mean_map_hw, progress=progress),
        model=model,
        colors=ColorFinder(Palette(albedo=PALETTE, nearest=nearest_colour)),
        pca=pca,
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
        "measures": list(args.measures),
        "alignment": "affine_disparity",
        "device": args.device,
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}",
        "threads": threads,
        "seconds": round(time.perf_counter() - started, 1),
    }
    say(
        f"{args.scenes} held-out scenes of generator version {GENERATOR_VERSION}, "
        f"{threads} thread(s), {facts['seconds']} s"
    )
    finish(args, values, facts, earlier)


def finish(args: EvaluateArgs, values: dict[str, float], facts: dict, earlier: dict[str, float]) -> None:
    """Write what was asked for, print the comparison, and fail for missed bounds if told to."""
    if args.json:
        write_json(args.json, facts | values | {"missed": missed(values)})
        say(f"figures: {args.json}")
    if args.markdown:
        write_text(args.markdown, markdown_table(values) + "\n")
        say(f"table: {args.markdown}")
    if earlier:
        say(compared(values, earlier))
    if args.strict and missed(values):
        sys.exit(1)


def read_figures(path: Path) -> dict[str, float]:
    """Read an earlier result."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--compare {path}: can't be read as a result of this command ({error})") from None


def held_out_scenes(count: int, *, size: int, mean_map_hw: Tensor, progress: Progress) -> SceneSet:
    """Render the first `count` held-out scenes."""
    progress.begin("held-out scenes")
    parts = list(rendered_batches(HELD_OUT_SEED, count, size=size, progress=progress))
    return SceneSet(
        rgb_N3hw=torch.cat([part.rgb_B3hw for part in parts]),
        disparity_Nhw=torch.cat([normalize_disparity(part.disparity_Bhw) for part in parts]),
        metric_Nhw=torch.cat([part.metric_Bhw for part in parts]),
        captions=[caption for part in parts for caption in part.captions],
        objects=[objects for part in parts for objects in seen_objects(part)],
        mean_map_hw=mean_map_hw,
    )


def seen_objects(batch: SceneBatch) -> list[list[SeenObject]]:
    """Return each scene's visible objects."""
    return [
        [
            SeenObject(color=item["colour"], mask_hw=ids_hw == place, named=item["named"])
            for place, item in enumerate(record["objects"])
            if item["visible_pixels"]
        ]
        for record, ids_hw in zip(batch.records, batch.ids_Bhw, strict=True)
    ]


def training_statistics(count: int, *, size: int, progress: Progress) -> tuple[PatchPCA, Tensor]:
    """Return the linear PCA of patches (pictures and disparity alike) and the mean disparity map of training scenes.

    Kept in outputs/evaluation/, since rendering takes a while and the result never changes.
    """
    path = statistics_file(count, size)
    if not path.exists():
        progress.begin("training scenes")
        statistics, total_hw = PatchStatistics(), torch.zeros(size, size, dtype=torch.float64)
        for part in rendered_batches(TRAINING_SEED, count, size=size, progress=progress):
            disparity_Bhw = normalize_disparity(part.disparity_Bhw)
            statistics.add(part.rgb_B3hw)
            statistics.add(disparity_Bhw[:, None].expand(-1, 3, -1, -1))
            total_hw += disparity_Bhw.sum(0, dtype=torch.float64)
        pca = statistics.fit()
        mean_map_hw = (total_hw / count).float()
        save_tensors(path, {"mean_P": pca.mean_P, "basis_KP": pca.basis_KP, "mean_map_hw": mean_map_hw})
    stored = load_file(path)
    return PatchPCA(mean_P=stored["mean_P"], basis_KP=stored["basis_KP"]), stored["mean_map_hw"]


def statistics_file(count: int, size: int) -> Path:
    """Return where the statistics of training scenes are kept."""
    folder = Path(__file__).resolve().parents[1] / "outputs" / "evaluation"
    return folder / f"training_scenes_v{GENERATOR_VERSION}_{count}_{size}.safetensors"


def rendered_batches(seed: int, count: int, *, size: int, progress: Progress) -> Iterator[SceneBatch]:
    """Yield the first `count` scenes of a seed in batches."""
    for start in range(0, count, RENDERED_AT_ONCE):
        part = render_batch(seed, range(start, min(start + RENDERED_AT_ONCE, count)), size)
        progress.advance(RENDER_WORK * len(part.captions))
        yield part


if __name__ == "__main__":
    run_main(main)
