"""Whole training runs of `train.py` in this process, on a tiny random base."""

import json
import runpy
import sys
from pathlib import Path

from accelerate.state import AcceleratorState
from fake_folder import write_autoencoder, write_base, write_cache, write_prompts

ROOT = Path(__file__).parents[1]
SMALL = ("--lora_rank", "4", "--vector_in_ranks", "4", "8", "--txt_in_rank", "8", "--save_precision", "fp32")


def prepare(folder: Path) -> Path:
    """Write data, held-out data, prompts, autoencoder and base into a folder; return it."""
    write_autoencoder(folder / "ae.safetensors")
    write_cache(folder / "data", autoencoder=folder / "ae.safetensors")
    write_cache(folder / "held_out", autoencoder=folder / "ae.safetensors")
    write_prompts(folder)
    write_base(folder / "base.safetensors")
    return folder


def flags(folder: Path, *more: str) -> list[str]:
    """Flags of a run on what `prepare` wrote."""
    return [
        *("--image_folder", str(folder / "data"), "--is_latent_training", "--prompt_folder", str(folder)),
        *("--pretrained_model_name_or_path", str(folder / "base.safetensors"), "--device", "cpu", "--num_threads", "1"),
        *("--learning_rate", "1e-2", "--output_dir", str(folder / "experiments"), *SMALL, *more),
    ]


def run(folder: Path, name: str, *more: str) -> Path:
    """Train in this process; return the experiment's folder."""
    AcceleratorState._reset_state(True)
    sys.argv = ["train.py", *flags(folder, "--exp_name", name, *more)]
    try:
        runpy.run_path(str(ROOT / "train.py"))["main"]()
    finally:
        AcceleratorState._reset_state(True)
    return folder / "experiments" / name


def lines(experiment: Path) -> list[dict]:
    """Return what the log says, line by line."""
    return [json.loads(line) for line in (experiment / "log.jsonl").read_text().splitlines()]


def addons(experiment: Path) -> bytes:
    """Return the bytes of the add-ons file written at the end."""
    return (experiment / "jointdit_addons.safetensors").read_bytes()
