"""Draw the embedded model's curves: python scripts/curves.py --output FOLDER.

Three kinds: quality against sampling steps and against guidance for each task (guidance if the backbone has an
embedding of it), and depth accuracy against training pairs, for add-ons of several moments or trainings
(--addons 16000=FILE 64000=FILE). The depth of generated pictures is always estimated by the model itself, in
--depth_steps steps at the usual guidance. Writes curves.json, curves.md and curves.png into --output, anew after every
point; started again, it goes on with the points that are missing.
"""

import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dataset.evaluation_scenes import evaluation_setting
from dataset.synthetic import GENERATOR_VERSION
from library.args import DEVICES, Flags, find_device, flag, parse
from library.cli import run_main, say, set_threads
from library.errors import UserError
from library.evaluation.curve_plot import Plot, draw
from library.evaluation.embedded import Setting, measure_depth, measure_depth_to_image, measure_joint
from library.evaluation.generation import load_batched_model
from library.evaluation.judged import PRECISIONS, Judge, JudgedModel, with_addons
from library.evaluation.progress import Progress
from library.files import write_atomically, write_json, write_text
from library.fingerprint import fingerprint, fingerprints, in_words
from library.flags import given
from library.pipeline import GUIDANCE_SCALE
from library.results import machine
from library.weight_paths import embedded_files, find_addons
from library.writable import require_writable, writing

BASELINE_SCENES = 16  # training scenes behind the baselines, which the curves don't show


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One task's quality: what measures it, which of `Setting`'s step counts is its own, and the figures shown."""

    label: str
    measure: Callable[[Setting], dict[str, float]]
    steps: str
    keys: tuple[str, ...]


TASKS: dict[str, Task] = {
    "depth": Task(
        label="Depth estimation", measure=measure_depth, steps="depth_steps", keys=("depth_absrel", "depth_delta1")
    ),
    "depth_to_image": Task(
        label="Depth to image",
        measure=measure_depth_to_image,
        steps="steps",
        keys=("d2i_absrel", "d2i_ratio", "d2i_color_words", "d2i_shape_words"),
    ),
    "joint": Task(
        label="Joint generation",
        measure=measure_joint,
        steps="steps",
        keys=("joint_absrel", "joint_ratio", "color_words", "shape_words", "feature_distance_ratio"),
    ),
}
NOT_DRAWN = {"feature_distance_ratio", "depth_delta1"}  # on scales of their own: in the tables alone
OVER = {"steps": "sampling steps", "guidance": "guidance", "pairs": "training pairs"}  # what is varied, in words


@dataclass(frozen=True, kw_only=True)
class CurvesArgs(Flags):
    """The curves."""

    output: Path = flag(Path("outputs/curves"), help="folder for tables, figures and picture", metavar="FOLDER")
    model_folder: Path | None = flag(
        None, help="folder with the embedded model's file names (otherwise assets/tiny)", metavar="FOLDER"
    )
    tasks: tuple[str, ...] = flag(tuple(TASKS), help="tasks to vary steps and guidance of", choices=tuple(TASKS))
    steps: tuple[int, ...] = flag((1, 2, 4, 8, 16, 32, 50), help="numbers of sampling steps", minimum=1)
    guidance: tuple[float, ...] = flag(
        (1, 2, 3, 4, 5, 6, 7), help="guidance scales, for a backbone with an embedding of it", minimum=0.0
    )
    addons: tuple[str, ...] = flag(
        (), help="add-ons by the number of training pairs behind them, for the third kind", metavar="PAIRS=FILE"
    )
    scenes: int = flag(64, help="held-out scenes", minimum=2)
    sampling_steps: int = flag(
        12, help="steps of joint generation and depth to image where guidance is varied", minimum=1
    )
    depth_steps: int = flag(8, help="steps of depth estimation where they aren't varied", minimum=1)
    precision: str = flag("bf16", help="precision of the model; no is the weights' own", choices=PRECISIONS)
    minutes: float = flag(0.0, help="begin no point after so long; start again to go on (0: no limit)", minimum=0.0)
    batch: int = flag(32, help="samples at a time", minimum=1)
    num_threads: int = flag(0, help="CPU threads; 0 takes the cores this process may use", minimum=0)
    device: str = flag("cpu", help="where the model computes; auto takes CUDA, then MPS", choices=DEVICES)

    def __post_init__(self) -> None:
        super().__post_init__()
        for text in self.addons:
            if not re.fullmatch("0*[1-9][0-9]*=.+", text):
                raise UserError(f"--addons {text}: must be PAIRS=FILE, such as 4000=run/jointdit_addons.safetensors")
        numbers = [pairs for pairs, _ in self._numbered_addons()]
        twice = next((number for number in numbers if numbers.count(number) > 1), None)
        if twice is not None:
            raise UserError(f"--addons {' '.join(self.addons)}: {twice} is there twice; one point is one file")

    def addons_by_pairs(self) -> dict[int, Path]:
        """Return the add-ons files by their number of training pairs, fewest first."""
        return {pairs: find_addons(Path(path), flag="addons") for pairs, path in sorted(self._numbered_addons())}

    def _numbered_addons(self) -> list[tuple[int, str]]:
        return [(int(pairs), path) for pairs, _, path in (text.partition("=") for text in self.addons)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One point of a curve: what is varied (a key of `OVER`), whose quality, and where."""

    over: str
    task: str
    value: float


Figures = Mapping[str, float]


def main() -> None:
    """Measure every point that has no figures yet, and write all curves after each."""
    args = parse(sys.argv[1:], CurvesArgs, description=__doc__)
    require_writable(args.output / "curves.json", told=f"--output {args.output}")
    started = time.monotonic()
    threads = set_threads(args.num_threads)
    device = find_device(args.device)
    paths, addons = embedded_files(folder=args.model_folder), args.addons_by_pairs()
    facts = fixed_facts(args, paths, addons, device=device.type)
    known = read_points(args.output, facts)
    judge = make_judge(args, paths, device=device)
    guided = judge.model.model.config.guidance_embed
    if not guided and given(args, ["guidance"]):
        raise UserError("--guidance: the backbone has no guidance embedding; leave the flag away")
    facts["guidance_embedding"] = guided
    facts["machine"] = f"{machine()}, {threads} thread(s)"
    points = list(all_points(args, guided=guided, pairs=addons))
    missing = [point for point in points if point not in known]
    setting = make_setting(args, judge) if missing else None
    for number, point in enumerate(missing):
        if args.minutes and time.monotonic() - started > 60 * args.minutes:
            say(f"--minutes {args.minutes:g}: {len(missing) - number} points are left; start again to go on")
            break
        assert setting is not None
        figures = TASKS[point.task].measure(setting_of(point, setting, judge=judge, paths=paths, addons=addons))
        known[point] = {key: figures[key] for key in TASKS[point.task].keys}
        said = ", ".join(f"{key} {value:.4f}" for key, value in known[point].items())
        say(f"{TASKS[point.task].label}, {OVER[point.over]} {shown(point.value)}: {said}")
        write_results(args.output, known, facts)
    say(f"{args.output}/{', '.join(write_results(args.output, known, facts))}")


def all_points(args: CurvesArgs, *, guided: bool, pairs: Mapping[int, Path]) -> Iterator[Point]:
    """Yield all points that the flags ask for."""
    for count in pairs:
        yield Point(over="pairs", task="depth", value=count)
    for task in args.tasks:
        for steps in sorted(set(args.steps)):
            yield Point(over="steps", task=task, value=steps)
    for task in args.tasks if guided else ():
        for scale in sorted(set(args.guidance)):
            yield Point(over="guidance", task=task, value=scale)


def setting_of(
    point: Point, setting: Setting, *, judge: Judge, paths: Mapping[str, Path], addons: Mapping[int, Path]
) -> Setting:
    """Return the setting in which one point is measured."""
    if point.over == "steps":
        return replace(setting, **{TASKS[point.task].steps: int(point.value)})
    if point.over == "guidance":
        model = replace(judge.model, guidance=point.value)
    else:
        model = with_addons(judge.model, paths, addons[int(point.value)])
    return replace(setting, model=JudgedModel(model=model, judge=judge))


def make_judge(args: CurvesArgs, paths: Mapping[str, Path], *, device: torch.device) -> Judge:
    """Load the model."""
    model = load_batched_model(paths, progress=Progress(total=1), batch=args.batch, device=device)
    return Judge(model=model, steps=args.depth_steps, precision=args.precision)


def make_setting(args: CurvesArgs, judge: Judge) -> Setting:
    """Render the scenes."""
    return evaluation_setting(
        JudgedModel(model=judge.model, judge=judge),
        scenes=args.scenes,
        training_scenes=BASELINE_SCENES,
        size=judge.model.size,
        progress=judge.model.progress,
        steps=args.sampling_steps,
        depth_steps=args.depth_steps,
    )


def fixed_facts(args: CurvesArgs, paths: Mapping[str, Path], addons: Mapping[int, Path], *, device: str) -> dict:
    """Return what must be the same for all points of a folder."""
    return {
        "scenes": args.scenes,
        "generator_version": GENERATOR_VERSION,
        "sampling_steps": args.sampling_steps,
        "depth_steps": args.depth_steps,
        "precision": args.precision,
        "device": device,
        "weights": fingerprints(paths),
        "addons": {str(pairs): fingerprint(path) for pairs, path in addons.items()},
    }


def read_points(folder: Path, facts: dict) -> dict[Point, Figures]:
    """Return the points an earlier run left, and add its add-ons to the facts.

    Raises:
        UserError: they were measured otherwise.
    """
    path = folder / "curves.json"
    if not path.exists():
        return {}
    stored = json.loads(path.read_text(encoding="utf-8"))
    addons = stored["addons"] | facts["addons"]
    changed = [name for name in facts if name != "addons" and facts[name] != stored[name]]
    changed += [f"addons {pairs}" for pairs, print_ in stored["addons"].items() if addons[pairs] != print_]
    if changed:
        raise UserError(f"--output {folder}: holds curves made with other {', '.join(changed)}; give another folder")
    facts["addons"] = addons
    return {
        Point(over=over, task=task, value=float(value)): figures
        for over, tasks in stored["curves"].items()
        for task, table in tasks.items()
        for value, figures in table.items()
    }


def tables_of(known: Mapping[Point, Figures]) -> dict[str, dict[str, dict[float, Figures]]]:
    """Return the figures by what is varied, task and value, in the order of `OVER`, `TASKS` and size."""
    tables: dict[str, dict[str, dict[float, Figures]]] = {}
    order = sorted(known, key=lambda point: (list(OVER).index(point.over), list(TASKS).index(point.task), point.value))
    for point in order:
        tables.setdefault(point.over, {}).setdefault(point.task, {})[point.value] = known[point]
    return tables


def write_results(folder: Path, known: Mapping[Point, Figures], facts: Mapping) -> list[str]:
    """Write figures, tables and, where there are any, drawings; return the files' names."""
    tables = tables_of(known)
    plots = [plot(over, task, table) for over, tasks in tables.items() for task, table in tasks.items()]
    by_text = {
        over: {task: {shown(value): figures for value, figures in table.items()} for task, table in tasks.items()}
        for over, tasks in tables.items()
    }
    with writing(f"--output {folder}"):
        write_json(folder / "curves.json", {**facts, "curves": by_text})
        write_text(folder / "curves.md", markdown(tables, facts))
        if plots:
            with write_atomically(folder / "curves.png") as temporary:
                draw(plots).save(temporary)
    return ["curves.json", "curves.md", *(["curves.png"] if plots else [])]


def shown(value: float) -> str:
    """Return a number exactly, whole ones without a point."""
    return str(int(value)) if value == int(value) else repr(value)


def plot(over: str, task: str, table: Mapping[float, Figures]) -> Plot:
    """Return the drawing of one table."""
    return Plot(
        title=f"{TASKS[task].label} against {OVER[over]}",
        x_label=OVER[over],
        curves={
            key: [(value, figures[key]) for value, figures in table.items()]
            for key in TASKS[task].keys
            if key not in NOT_DRAWN
        },
        log=over != "guidance",
    )


def markdown(tables: Mapping[str, Mapping[str, Mapping[float, Figures]]], facts: Mapping) -> str:
    """Return all tables as Markdown."""
    guided = (
        f"Guidance {GUIDANCE_SCALE} where it isn't varied."
        if facts["guidance_embedding"]
        else "No curve against guidance: the backbone has no guidance embedding."
    )
    parts = [
        "# Curves",
        f"{facts['scenes']} held-out scenes of generator version {facts['generator_version']}, {facts['device']}, "
        f"precision {facts['precision']}, {facts['machine']}. Where they aren't varied, {facts['sampling_steps']} "
        f"sampling steps, {facts['depth_steps']} for depth. {guided} Weights: {in_words(facts['weights'])}.",
    ]
    for over, tasks in tables.items():
        for task, table in tasks.items():
            keys = TASKS[task].keys
            lines = [f"| {OVER[over]} | " + " | ".join(f"`{key}`" for key in keys) + " |"]
            lines.append("|---" * (len(keys) + 1) + "|")
            for value, figures in table.items():
                lines.append(f"| {shown(value)} | " + " | ".join(f"{figures[key]:.4f}" for key in keys) + " |")
            parts += [f"## {TASKS[task].label} against {OVER[over]}", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    run_main(main)
