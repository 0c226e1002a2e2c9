"""Draw the embedded model's curves: python scripts/curves.py --output FOLDER.

Two kinds: quality against sampling steps for each task, and depth accuracy against training pairs, for add-ons of
several trainings (--addons 1000=FILE 4000=FILE). Writes curves.json, curves.md and curves.png into --output. There is
no curve against guidance: the embedded model has no guidance embedding.
"""

import os
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dataset.evaluation_scenes import color_finder, held_out_scenes, shape_finder, training_statistics
from dataset.synthetic import GENERATOR_VERSION
from library.args import Flags, flag, parse
from library.cli import run_main, say, set_threads
from library.errors import UserError
from library.evaluation.curve_plot import Plot, draw
from library.evaluation.embedded import Setting, measure_depth, measure_depth_to_image, measure_joint
from library.evaluation.generation import BatchedModel, load_batched_model
from library.evaluation.progress import Progress
from library.files import write_atomically, write_json, write_text
from library.weight_paths import embedded_files, find_addons

BASELINE_SCENES = 16  # training scenes behind the baselines, which the curves don't show


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """One task's quality: what measures it, which of `Setting`'s step counts is varied, and the figures shown."""

    label: str
    measure: Callable[[Setting], dict[str, float]]
    varied: str
    keys: tuple[str, ...]


# By the task's name; the depth of generated pictures is always estimated again in the same number of steps.
CURVES: dict[str, Curve] = {
    "depth": Curve(
        label="Depth estimation", measure=measure_depth, varied="depth_steps", keys=("depth_absrel", "depth_delta1")
    ),
    "depth_to_image": Curve(
        label="Depth to image",
        measure=measure_depth_to_image,
        varied="steps",
        keys=("d2i_absrel", "d2i_ratio", "d2i_shape_words"),
    ),
    "joint": Curve(
        label="Joint generation",
        measure=measure_joint,
        varied="steps",
        keys=("joint_absrel", "joint_ratio", "color_words", "shape_words", "feature_distance_ratio"),
    ),
}
NOT_DRAWN = {"feature_distance_ratio"}  # on a scale of its own


@dataclass(frozen=True, kw_only=True)
class CurvesArgs(Flags):
    """The curves."""

    output: Path = flag(Path("outputs/curves"), help="folder for table, figures and picture", metavar="FOLDER")
    tasks: tuple[str, ...] = flag(tuple(CURVES), help="tasks to vary the steps of", choices=tuple(CURVES))
    steps: tuple[int, ...] = flag((1, 2, 4, 8, 12, 20, 50), help="numbers of sampling steps", minimum=1)
    scenes: int = flag(64, help="held-out scenes", minimum=2)
    addons: tuple[str, ...] = flag(
        (), help="add-ons by the number of training pairs behind them, for the second curve", metavar="PAIRS=FILE"
    )
    depth_steps: int = flag(8, help="steps of depth estimation where they aren't varied", minimum=1)
    batch: int = flag(32, help="samples at a time", minimum=1)
    num_threads: int = flag(0, help="CPU threads; 0 takes the cores this process may use", minimum=0)
    device: str = flag("cpu", help="where the model computes, such as cpu or cuda")

    def __post_init__(self) -> None:
        super().__post_init__()
        for text in self.addons:
            if not text.partition("=")[0].isdigit() or not text.partition("=")[2]:
                raise UserError(f"--addons {text}: must be PAIRS=FILE, such as 4000=run/jointdit_addons.safetensors")

    def addons_by_pairs(self) -> dict[int, Path]:
        """Return the add-ons files by their number of training pairs, fewest first."""
        found = {int(text.partition("=")[0]): find_addons(Path(text.partition("=")[2])) for text in self.addons}
        return dict(sorted(found.items()))


Table = dict[int, dict[str, float]]  # figures by what is varied


def main() -> None:
    """Measure every point and write all curves."""
    args = parse(sys.argv[1:], CurvesArgs, description=__doc__)
    threads = set_threads(args.num_threads)
    addons = args.addons_by_pairs()
    setting = make_setting(args)
    tables: dict[str, Table] = {}
    for name in args.tasks:
        curve, tables[name] = CURVES[name], {}
        for count in sorted(set(args.steps)):
            figures = curve.measure(replace(setting, **{curve.varied: count}))
            tables[name][count] = {key: figures[key] for key in curve.keys}
            say(f"{name}, {count} steps: {words(tables[name][count])}")
    for pairs, path in addons.items():
        figures = measure_depth(replace(setting, model=load_model(args, setting.progress, path)))
        tables.setdefault("pairs", {})[pairs] = {key: figures[key] for key in CURVES["depth"].keys}
        say(f"{pairs} training pairs: {words(tables['pairs'][pairs])}")
    facts = {
        "scenes": args.scenes,
        "generator_version": GENERATOR_VERSION,
        "depth_steps": args.depth_steps,
        "device": args.device,
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "threads": threads,
        "guidance": guidance(setting.model),
    }
    write_json(args.output / "curves.json", facts | {"curves": tables})
    write_text(args.output / "curves.md", markdown(tables, facts))
    with write_atomically(args.output / "curves.png") as temporary:
        draw([plot(name, table) for name, table in tables.items()]).save(temporary)
    say(f"{args.output}/curves.json, curves.md, curves.png")


def make_setting(args: CurvesArgs) -> Setting:
    """Render the scenes and load the embedded model."""
    progress = Progress(total=1)
    pca, mean_map_hw = training_statistics(BASELINE_SCENES, size=128, progress=progress)
    return Setting(
        scenes=held_out_scenes(args.scenes, size=128, mean_map_hw=mean_map_hw, progress=progress),
        model=load_model(args, progress),
        colors=color_finder(),
        shapes=shape_finder(),
        pca=pca,
        progress=progress,
        depth_steps=args.depth_steps,
    )


def guidance(model: BatchedModel) -> str:
    """Return why there is no curve against guidance."""
    if model.model.config.guidance_embed:
        return "The model's guidance embedding isn't varied here."
    return "No curve against guidance: the model has no guidance embedding."


def load_model(args: CurvesArgs, progress: Progress, addons: Path | None = None) -> BatchedModel:
    """Load the embedded model, with other add-ons if given."""
    paths = embedded_files() | ({"jointdit_addons_path": addons} if addons else {})
    return load_batched_model(paths, progress=progress, batch=args.batch, device=torch.device(args.device))


def title(name: str) -> tuple[str, str]:
    """Return what a curve shows, and over what."""
    return ("Depth estimation", "training pairs") if name == "pairs" else (CURVES[name].label, "steps")


def plot(name: str, table: Table) -> Plot:
    """Return the drawing of one table."""
    keys = [key for key in next(iter(table.values())) if key not in NOT_DRAWN]
    label, over = title(name)
    return Plot(
        title=f"{label} against {over}",
        x_label=over,
        curves={key: [(count, figures[key]) for count, figures in table.items()] for key in keys},
    )


def markdown(tables: dict[str, Table], facts: dict) -> str:
    """Return all tables as Markdown."""
    parts = [
        "# Curves",
        f"{facts['scenes']} held-out scenes of generator version {facts['generator_version']}, {facts['device']}, "
        f"{facts['machine']}, {facts['threads']} thread(s). {facts['guidance']}",
    ]
    for name, table in tables.items():
        label, over = title(name)
        keys = list(next(iter(table.values())))
        lines = [f"| {over} | " + " | ".join(f"`{key}`" for key in keys) + " |", "|---" * (len(keys) + 1) + "|"]
        for count, figures in table.items():
            lines.append(f"| {count} | " + " | ".join(f"{figures[key]:.4f}" for key in keys) + " |")
        parts += [f"## {label} against {over}", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def words(figures: dict[str, float]) -> str:
    """Return figures in one line."""
    return ", ".join(f"{key} {value:.4f}" for key, value in figures.items())


if __name__ == "__main__":
    run_main(main)
