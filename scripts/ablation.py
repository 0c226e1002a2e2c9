"""Repeat the paper's ablation on the embedded model: python scripts/ablation.py --image_folder F --output FOLDER.

Every arm is trained from the same base on the same data for as many steps, once for each seed, and measured on the same
held-out scenes with the same noise. What all runs share is made once: the cache (dataset/preprocess_step2.py), the
prompts, the scenes, the judge's look at true pictures. Writes ablation.json and ablation.md into --output, anew after
every run, of all runs that have figures there. Started again, it skips those and goes on with what was interrupted. The
arms stand in library/evaluation/ablation.py.
"""

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from dataset.evaluation_scenes import baseline_scenes, evaluation_setting
from dataset.layout import IMAGE_SUFFIXES, Layout
from dataset.sample_index import scan
from dataset.synthetic import GENERATOR_VERSION, HELD_OUT_SEED
from library.args import Flags, find_device, flag, flag_values, parse
from library.cli import run_main, say, set_threads
from library.errors import UserError
from library.evaluation.ablation import ARMS, Arm, Results, report, summary
from library.evaluation.embedded import Setting, measure, measure_set
from library.evaluation.generation import load_batched_model
from library.evaluation.judged import PRECISIONS, Judge, JudgedModel, with_addons
from library.evaluation.progress import Progress
from library.files import write_json, write_text
from library.fingerprint import fingerprints, in_words
from library.results import machine
from library.weight_paths import EMBEDDED, FROZEN, embedded_files, find_addons
from library.writable import require_writable, writing

ROOT = Path(__file__).resolve().parents[1]
ADDONS = "jointdit_addons"
MEASURES = ("depth", "depth_to_image", "joint")
# The recipe of scripts/train_tiny.sh's joint stage; --train_flags overrides it.
RECIPE = {
    "train_batch_size": "16",
    "learning_rate": "2e-3",
    "optimizer_type": "adamw",
    "optimizer_args": "weight_decay=0.01 betas=(0.9,0.99)",
    "lr_scheduler": "cosine",
    "ema_decay": "0.998",
    "lora_rank": "64",
    "vector_in_ranks": "64 64",
    "txt_in_rank": "64",
    "discrete_flow_shift": "3.1582",
    "clean_flow_shift": "0.25",
    "mixed_precision": "bf16",
}
# Flags of train.py that this command decides.
OWN = {"output_dir", "exp_name", "output_name", "max_train_steps", "max_train_epochs", "seed", "weighting", "resume",
       "save_state", "save_last_n", "save_last_n_addons", "unbalanced_sampling", "no_unbalanced_sampling",
       "image_folder", "prompt_folder"}  # fmt: skip
# Flags that must be the same when results are added to a folder; arms and seeds may be added.
FIXED = ("steps", "scenes", "sampling_steps", "depth_steps", "precision", "train_flags")


@dataclass(frozen=True, kw_only=True)
class AblationArgs(Flags):
    """The ablation."""

    image_folder: Path = flag(
        Path("outputs/tiny/scenes"),
        help="prepared folder of training scenes; its cache, where there is one, spares the encoding",
        metavar="FOLDER",
    )
    base: Path = flag(EMBEDDED, help="folder with the frozen parts under the embedded model's names", metavar="FOLDER")
    output: Path = flag(Path("outputs/ablation"), help="folder of runs, figures and tables", metavar="FOLDER")
    arms: tuple[str, ...] = flag(tuple(ARMS), help="arms to train and measure", choices=tuple(ARMS))
    seeds: int = flag(3, help="runs of each arm, with the seeds 1, 2, ...", minimum=1)
    steps: int = flag(1000, help="optimizer steps of each run", minimum=1)
    scenes: int = flag(64, help="held-out scenes to measure on", minimum=2)
    sampling_steps: int = flag(8, help="steps of joint generation and depth to image when measuring", minimum=1)
    depth_steps: int = flag(4, help="steps of depth estimation when measuring", minimum=1)
    judge: Path | None = flag(
        None,
        help="add-ons that estimate the depth of all generated pictures, whatever arm made them (otherwise --base's)",
        metavar="PATH",
    )
    precision: str = flag("bf16", help="precision of the models when measuring", choices=PRECISIONS)
    train_flags: tuple[str, ...] = flag(
        (), help="flags of train.py to change in every run: NAME=VALUE, or NAME of a switch", metavar="NAME=VALUE"
    )
    device: str = flag("auto", help="where to compute; auto takes CUDA, then the CPU", choices=("auto", "cuda", "cpu"))
    num_threads: int = flag(0, help="CPU threads; 0 takes the cores this process may use", minimum=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        for text in self.train_flags:
            name = text.split("=")[0]
            if not name.isidentifier():
                raise UserError(f"--train_flags {text}: write NAME=VALUE without dashes, or NAME alone for a switch")
            if name in OWN:
                raise UserError(f"--train_flags {text}: the ablation sets {name} itself")
            if name in FROZEN:
                raise UserError(f"--train_flags {text}: all runs share the frozen parts; give --base their folder")

    @property
    def kind(self) -> str:
        """Kind of device."""
        return self.device if self.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"

    def frozen_paths(self) -> dict[str, Path]:
        """Return the files of the frozen parts by train.py's flag."""
        return embedded_files(FROZEN, folder=self.base, flag="base")

    def judge_paths(self) -> dict[str, Path]:
        """Return the files of the frozen parts and of the judge's add-ons, by flag."""
        addons = find_addons(self.judge or self.base, flag="judge" if self.judge else "base")
        return self.frozen_paths() | {"jointdit_addons_path": addons}


def main() -> None:
    """Read the flags, run every arm that has no figures yet, write the tables."""
    args = parse(sys.argv[1:], AblationArgs, description=__doc__)
    require_writable(args.output / "ablation.json", told=f"--output {args.output}")
    find_device(args.kind)  # refuses one that isn't there
    threads = set_threads(args.num_threads)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the run in progress is told to stop
    weights = check_settings(args)["weights"]
    measuring = Measuring(args, threads=threads)
    for seed in range(1, args.seeds + 1):  # seed by seed: an interrupted ablation compares what it has
        for name in args.arms:
            figures = figures_file(args.output, name, seed)
            if not figures.exists():
                say(f"== {ARMS[name].label}, seed {seed}")
                addons = train(args, name, seed, threads=threads)
                measured = measuring.figures(addons)
                with writing(f"--output {args.output}"):
                    write_json(figures, measured)
                write_results(args, read_results(args.output), weights=weights)
    write_results(args, read_results(args.output), weights=weights)
    say(f"{args.output / 'ablation.md'}")


def check_settings(args: AblationArgs) -> dict[str, Any]:
    """Note and return what all runs share, and refuse a folder whose runs were made otherwise."""
    path = args.output / "settings.json"
    now = {name: value for name, value in flag_values(args).items() if name in FIXED}
    now |= training_set(args) | {
        "device": args.kind,
        "generator_version": GENERATOR_VERSION,
        "recipe": RECIPE,
        "weights": fingerprints(args.judge_paths()),
    }
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = [name for name in now if now[name] != before.get(name)]
        if changed:
            told = ", ".join(f"{name} {before.get(name)}, now {now[name]}" for name in changed)
            raise UserError(f"--output {args.output}: holds runs made with {told}; give another folder")
    write_json(path, now)
    return now


def training_set(args: AblationArgs) -> dict[str, str | int | bool]:
    """Return what tells one training set from another.

    Raises:
        UserError: there is none, or it holds the scenes that are measured on.
    """
    layout = Layout(args.image_folder)
    names = sorted(name for name, _ in scan(layout.processed_images, *IMAGE_SUFFIXES))
    if not names:
        raise UserError(
            f"--image_folder {args.image_folder}: no scenes there; make them with dataset/make_scenes.py and cache "
            "them with dataset/preprocess_step2.py"
        )
    record = layout.scene(names[0])
    if record.exists() and json.loads(record.read_text(encoding="utf-8")).get("seed") == HELD_OUT_SEED:
        raise UserError(f"--image_folder {args.image_folder}: scenes of seed {HELD_OUT_SEED} are kept for measuring")
    return {"image_folder": str(args.image_folder.resolve()), "training_scenes": len(names), "cached": cached(args)}


class Measuring:
    """Scenes, judge and finders, made when the first arm is measured and kept for all others."""

    def __init__(self, args: AblationArgs, *, threads: int) -> None:
        self.args = args
        self.threads = threads
        self.paths = args.judge_paths()

    @cached_property
    def judge(self) -> Judge:
        """The model that looks at generated pictures."""
        model = load_batched_model(self.paths, progress=Progress(total=1), device=self.args.kind)
        return Judge(model=model, steps=self.args.depth_steps, precision=self.args.precision)

    @cached_property
    def setting(self) -> Setting:
        """All that is the same for every arm; the model is the judge's own until an arm takes its place."""
        return evaluation_setting(
            JudgedModel(model=self.judge.model, judge=self.judge),
            scenes=self.args.scenes,
            training_scenes=baseline_scenes(self.args.scenes),
            size=self.judge.model.size,
            progress=self.judge.model.progress,
            steps=self.args.sampling_steps,
            depth_steps=self.args.depth_steps,
        )

    @cached_property
    def baselines(self) -> dict[str, float]:
        """Figures of the scenes themselves."""
        return measure_set(self.setting)

    def figures(self, addons: Path) -> dict[str, float | str]:
        """Measure one arm's add-ons."""
        model = JudgedModel(model=with_addons(self.judge.model, self.paths, addons), judge=self.judge)
        where = f"{machine()}, {self.threads} thread(s)"
        return {"machine": where, **self.baselines, **measure(replace(self.setting, model=model), MEASURES)}


def train(args: AblationArgs, name: str, seed: int, *, threads: int) -> Path:
    """Train one arm, or go on with it, and return its add-ons file."""
    run = args.output / "runs" / f"{name}_seed{seed}"
    addons = run / f"{ADDONS}.safetensors"
    if not addons.exists():
        if cached(args) and not (args.output / "prompts" / "empty_prompts").exists():
            call(*prompts_command(args))
        call(*train_command(args, ARMS[name], run=run, seed=seed, threads=threads))
        if not addons.exists():
            raise UserError(f"--output {args.output}: {run.name} was stopped before its end; start again to go on")
    for left in (*run.glob("state_step_*"), *run.glob(f"{ADDONS}_step_*")):
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    return addons


def cached(args: AblationArgs) -> bool:
    """Whether the training scenes are encoded already."""
    return Layout(args.image_folder).cache_meta.exists()


def prompts_command(args: AblationArgs) -> list[str]:
    """Return the command line that encodes the empty prompt, so that no run has to load the text encoders."""
    frozen = args.frozen_paths()
    words = [word for name in ("clip_l", "t5xxl") for word in (f"--{name}", str(frozen[name]))]
    return ["dataset/preprocess_step3.py", *words, "--output_folder", str(args.output / "prompts")]


def train_command(args: AblationArgs, arm: Arm, *, run: Path, seed: int, threads: int) -> list[str]:
    """Return the command line that trains an arm."""
    values = {
        **RECIPE,
        "lr_warmup_steps": str(min(100, args.steps // 10)),
        "save_every_n_steps": str(max(1, args.steps // 4)),
        "device": args.kind,
        "num_threads": str(threads),
    }
    switches = ["is_latent_training"] if cached(args) else []
    for text in args.train_flags:
        name, equals, value = text.partition("=")
        values.pop(name, None)
        if equals:
            values[name] = value
        else:
            switches.append(name)
    own = {
        "image_folder": args.image_folder,
        **args.frozen_paths(),
        "output_dir": run.parent,
        "exp_name": run.name,
        "output_name": ADDONS,
        "max_train_steps": args.steps,
        "seed": seed,
        "weighting": arm.weighting,
        "save_last_n": 1,
        "save_last_n_addons": 1,
        "resume": "latest",
        **({"prompt_folder": args.output / "prompts"} if cached(args) else {}),
    }
    switches += ["save_state", "unbalanced_sampling" if arm.unbalanced else "no_unbalanced_sampling"]
    command = ["train.py"]
    for name, value in values.items():
        command += [f"--{name}", *value.split()]
    for name, value in own.items():
        command += [f"--{name}", str(value)]
    return command + [f"--{name}" for name in switches]


def call(script: str, *arguments: str) -> None:
    """Run one of this project's commands to its end, telling it to stop where this one is."""
    process = subprocess.Popen([sys.executable, str(ROOT / script), *arguments])
    try:
        status = process.wait()
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        raise
    if status:
        raise UserError(f"{script}: failed with status {status}; the reason stands above")


def figures_file(folder: Path, name: str, seed: int) -> Path:
    """Return where the figures of an arm's run are kept."""
    return folder / "figures" / f"{name}_seed{seed}.json"


def read_results(folder: Path) -> Results:
    """Return the figures of all runs measured so far, in this call or an earlier one, by arm and seed."""
    names = [re.fullmatch(r"(\w+)_seed(\d+)\.json", path.name) for path in (folder / "figures").glob("*.json")]
    runs = [(name[1], int(name[2])) for name in names if name and name[1] in ARMS]
    results: dict[str, dict[int, dict[str, float]]] = {}
    for arm, seed in sorted(runs, key=lambda run: (list(ARMS).index(run[0]), run[1])):
        figures = json.loads(figures_file(folder, arm, seed).read_text(encoding="utf-8"))
        results.setdefault(arm, {})[seed] = figures
    return results


def write_results(args: AblationArgs, results: Results, *, weights: Mapping[str, str]) -> None:
    """Write the figures so far as JSON and as Markdown."""
    first = next(iter(next(iter(results.values())).values()))
    changed = f" with {' '.join(args.train_flags)}" if args.train_flags else ""
    facts = (
        f"Each run: {args.steps} steps from the same base ({args.base.name}), trained on {args.image_folder.name} by "
        f"the recipe of scripts/ablation.py{changed}. Weights: {in_words(weights)}. "
        f"Measured on {args.scenes} held-out "
        f"scenes of generator version {GENERATOR_VERSION} with the same noise, {args.sampling_steps} steps "
        f"({args.depth_steps} for depth), precision {args.precision}, on {args.kind}, {first['machine']}. Mean ± "
        "standard deviation over seeds. Depth of generated pictures is estimated by one judge for all arms "
        f"({'--judge' if args.judge else 'the add-ons beside the base'}); true pictures with their true depth score "
        f"{first['joint_absrel_true_pairs']:.4f} before it in joint generation's AbsRel. An arm has learned "
        f"depth where its AbsRel is below {first['depth_absrel_mean_map']:.4f}, that of the training scenes' mean map "
        f"(a constant map's is {first['depth_absrel_constant']:.4f})."
    )
    settings = {name: value for name, value in flag_values(args).items() if name not in ("arms", "seeds")}
    settings |= {"recipe": RECIPE, "generator_version": GENERATOR_VERSION}  # the results tell arms and seeds
    with writing(f"--output {args.output}"):
        write_json(args.output / "ablation.json", {"settings": settings, **summary(results)})
        write_text(args.output / "ablation.md", report(results, facts=facts))


if __name__ == "__main__":
    run_main(main)
