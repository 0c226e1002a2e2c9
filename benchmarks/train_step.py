"""Time and memory of one training step for each way of saving memory, on random weights: nothing is downloaded.

Each row runs in a process of its own, so that its peak is its own. `python benchmarks/train_step.py --help`
"""

import importlib
import json
import logging
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.args import Flags, flag, flag_values, parse
from library.batches import Batch, PromptFeatures
from library.cli import run_main, say, set_threads
from library.errors import UserError
from library.files import write_json, write_text
from library.flux.latents import PATCH, PIXELS_PER_TOKEN, image_ids, pack
from library.flux.text import TextFeatures
from library.flux.variants import FluxConfig
from library.jointdit.addons import AddonSettings, freeze_backbone
from library.jointdit.model import JointDiT, LoraRanks
from library.modality import MODALITIES
from library.randomness import generator_for
from library.training import Trainer
from library.training_args import TrainingArgs
from library.training_setup import base_dtype, fit, make_accelerator

log = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[1]
PAPER = "The paper: 4.03 s a step of batch 4 at 512 x 512 on one H100, checkpointed, with block swap and fused steps."
SEED = 0
LAZY = ("torch._dynamo", "transformers.optimization")  # what a step imports is none of its memory


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """A backbone with its text length and adapters' ranks, and the batch it is measured on."""

    flux: FluxConfig
    text_length: int
    ranks: LoraRanks
    resolution: int
    batch: int


SIZES = {
    "small": Size(
        flux=FluxConfig(
            vec_in_dim=32, context_in_dim=48, hidden_size=64, num_heads=2, depth=1, depth_single_blocks=2,
            axes_dim=(8, 12, 12),
        ),
        text_length=8, ranks=LoraRanks(blocks=4, vector_in=4, vector_out=4, text_in=4), resolution=64, batch=1,
    ),
    "middling": Size(
        flux=FluxConfig(
            vec_in_dim=256, context_in_dim=512, hidden_size=384, num_heads=3, depth=3, depth_single_blocks=6
        ),
        text_length=64, ranks=LoraRanks(blocks=16, vector_in=32, vector_out=32, text_in=32), resolution=256, batch=2,
    ),
    "full": Size(flux=FluxConfig(), text_length=512, ranks=LoraRanks(), resolution=512, batch=4),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One way to train, as flags of `train.py`; `sampling` takes a step without gradients instead."""

    flags: tuple[str, ...] = ()
    imports: tuple[str, ...] = ()
    gpu: bool = False
    sampling: bool = False


CHECKPOINTED = ("--gradient_checkpointing",)
FUSED = ("--fused_backward_pass",)
ROWS = {
    "plain": Row(),
    "checkpointed": Row(flags=CHECKPOINTED),
    "selective": Row(flags=(*CHECKPOINTED, "--checkpoint_every", "2")),
    "fused": Row(flags=FUSED),
    "checkpointed+fused": Row(flags=(*CHECKPOINTED, *FUSED)),
    "checkpointed+fused+bf16": Row(flags=(*CHECKPOINTED, *FUSED, "--addons_precision", "bf16"), gpu=True),
    "checkpointed+fused+compiled": Row(flags=(*CHECKPOINTED, *FUSED, "--compile"), gpu=True),
    "checkpointed+swap": Row(flags=(*CHECKPOINTED, "--blocks_to_swap", "8"), gpu=True),
    "int8": Row(flags=("--base_precision", "int8")),
    "fp8": Row(flags=("--base_precision", "fp8")),
    "nf4": Row(flags=("--base_precision", "nf4"), imports=("bitsandbytes",)),
    "sampling": Row(sampling=True),
}


@dataclass(frozen=True, kw_only=True)
class BenchmarkArgs(Flags):
    """Benchmark of one training step."""

    size: str = flag("middling", help="backbone: middling for a CPU, full is FLUX.1-dev's 12 B", choices=tuple(SIZES))
    device: str = flag("auto", help="where to compute", choices=("auto", "cuda", "cpu"))
    num_threads: int = flag(0, help="CPU threads; 0 takes the cores there are", minimum=0)
    rows: tuple[str, ...] = flag(tuple(ROWS), help="what to measure", choices=tuple(ROWS))
    steps: int = flag(3, help="timed steps, after one that warms up; the median counts", minimum=1)
    batch: int | None = flag(None, help="pairs a step (default: the size's own)", minimum=1)
    resolution: int | None = flag(None, help="side of the pictures in pixels (default: the size's own)", minimum=16)
    json: Path | None = flag(None, help="write the numbers here", metavar="FILE")
    markdown: Path | None = flag(None, help="write the table here", metavar="FILE")
    only: str | None = flag(None, help="measure this row in this process and print it as JSON", choices=tuple(ROWS))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.resolution is not None and self.resolution % PIXELS_PER_TOKEN:
            raise UserError(f"--resolution {self.resolution}: must be a multiple of {PIXELS_PER_TOKEN}")


def main() -> None:
    """Measure all rows, or one of them."""
    args = parse(sys.argv[1:], BenchmarkArgs, description="Time and peak memory of one training step")
    if args.only is not None:
        set_threads(args.num_threads)
        say(json.dumps(measure(args, ROWS[args.only])))
        return
    results = {name: in_fresh_process(args, name) for name in args.rows}
    text = table(args, results)
    say(text)
    if args.json is not None:
        write_json(args.json, {"flags": flag_values(args), "rows": results})
    if args.markdown is not None:
        write_text(args.markdown, text + "\n")


# ---- one row --------------------------------------------------------------------------------------------------------


class _Names:
    """Stands for a data set: the batch is always the same."""

    buckets = None

    def __init__(self, count: int) -> None:
        self.names = [f"{number:08d}" for number in range(count)]


def measure(args: BenchmarkArgs, row: Row) -> dict[str, Any]:
    """Build the model, take the steps, and return seconds a step, peak bytes and where it ran."""
    size = SIZES[args.size]
    batch_size, resolution = args.batch or size.batch, args.resolution or size.resolution
    flags = [
        *("--image_folder", "none", "--max_train_steps", "1000000", "--device", args.device, "--max_grad_norm", "0"),
        *("--train_batch_size", str(batch_size), "--optimizer_type", "adafactor", "--mixed_precision"),
    ]
    on_gpu = args.device != "cpu" and torch.cuda.is_available()
    training = parse([*flags, "bf16" if on_gpu else "no", *row.flags], TrainingArgs)
    accelerator = make_accelerator(training)
    device = accelerator.device
    for name in (*LAZY, *row.imports):
        with suppress(ImportError):
            importlib.import_module(name)
    before = resident_bytes() if device.type == "cpu" else 0
    kept_on = "cpu" if training.blocks_to_swap else device  # what is swapped begins in CPU memory
    model = random_model(size, dtype=base_dtype(accelerator), device=device, kept_on=kept_on)
    fit(model, training, accelerator)
    text = TextFeatures(
        tokens_BLD=torch.zeros(batch_size, size.text_length, size.flux.context_in_dim),
        pooled_BD=torch.zeros(batch_size, size.flux.vec_in_dim),
    )
    side = PATCH * resolution // PIXELS_PER_TOKEN
    latent_BChw = torch.randn(batch_size, 16, side, side, generator=generator_for(SEED, "latents"))
    batch = Batch(rgb_BChw=latent_BChw, depth_BChw=latent_BChw, text=text, names=("",) * batch_size).to(device)
    trainer = Trainer(
        training,
        accelerator=accelerator,
        model=model,
        settings=AddonSettings(),
        pairs=_Names(batch_size),  # type: ignore[arg-type]
        prompts=PromptFeatures(empty=TextFeatures(tokens_BLD=text.tokens_BLD[:1], pooled_BD=text.pooled_BD[:1])),
    )
    forget_peak(device)
    step = sampling_step(model, batch) if row.sampling else training_step(trainer, batch)
    seconds, busy = timed(step, count=args.steps, device=device)
    return {
        "seconds": seconds,
        "cpu_seconds": busy,
        "bytes": peak_bytes(device) - before,
        "where": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads",
        "device": device.type,
        "torch": torch.__version__,
    }


def random_model(
    size: Size, *, dtype: torch.dtype, device: torch.device | str, kept_on: torch.device | str
) -> JointDiT:
    """Make a backbone with add-ons, each weight drawn on `device` (a GPU draws 12 B in a moment)."""
    with torch.device("meta"):
        model = JointDiT(size.flux, ranks=size.ranks)
    generator = generator_for(SEED, "weights", device=device)
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            made = torch.empty(weight.shape, dtype=dtype, device=device)
            if weight.dim() == 1:
                made.fill_(0.0 if name == "bias" else 1.0)
            else:
                made.normal_(0, weight.shape[-1] ** -0.5, generator=generator)
            module._parameters[name] = torch.nn.Parameter(made.to(kept_on))
    return freeze_backbone(model)


def training_step(trainer: Trainer, batch: Batch) -> Iterator[Any]:
    """Take a step of the real training loop at each `next`."""
    batches = repeat(batch)
    for step in range(trainer.total):
        yield trainer.optimize(batches, step)


@torch.no_grad()
def sampling_step(model: JointDiT, batch: Batch) -> Iterator[Tensor]:
    """Take one denoising step of a batch of pairs at each `next`."""
    x_MBLD = pack(torch.stack([batch.rgb_BChw, batch.depth_BChw]))
    t_MB = torch.full(x_MBLD.shape[:2], 0.5, device=x_MBLD.device)
    rows, columns = (side // PATCH for side in batch.rgb_BChw.shape[-2:])
    ids = image_ids(rows, columns, device=x_MBLD.device)
    guidance_B = torch.ones(x_MBLD.shape[1], device=x_MBLD.device)
    dtype = next(model.parameters()).dtype
    assert len(x_MBLD) == len(MODALITIES)
    while True:
        with torch.autocast(x_MBLD.device.type, dtype=dtype, enabled=dtype != torch.float32):
            velocity = model(x_MBLD, t_MB=t_MB, text=batch.text, image_ids=ids, guidance_B=guidance_B)
        x_MBLD = x_MBLD - velocity.float() / 20
        yield x_MBLD


def timed(steps: Iterator[Any], *, count: int, device: torch.device) -> tuple[float, float]:
    """Return the seconds of a step, and those its threads computed together: medians of `count` after the first."""
    seconds, busy = [], []
    for _ in range(count + 1):
        start, busy_start = time.perf_counter(), time.process_time()
        next(steps)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
        busy.append(time.process_time() - busy_start)
    return statistics.median(seconds[1:]), statistics.median(busy[1:])


def resident_bytes(field: str = "VmRSS") -> int:
    """Read this process's memory now, or its peak (VmHWM), from Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def forget_peak(device: torch.device) -> None:
    """Count the peak from here on: loading and packing weights isn't part of a step."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: torch.device) -> int:
    """Most memory in use at once since `forget_peak`."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident_bytes("VmHWM")


# ---- all rows -------------------------------------------------------------------------------------------------------


def in_fresh_process(args: BenchmarkArgs, name: str) -> dict[str, Any]:
    """Measure one row in a process of its own; {"failed": reason} if it needs what isn't there."""
    if ROWS[name].gpu and (args.device == "cpu" or not torch.cuda.is_available()):
        return {"failed": "needs a GPU"}
    command = [sys.executable, str(Path(__file__).resolve()), "--only", name]
    for item in fields(args):
        value = getattr(args, item.name)
        if value is not None and item.name not in ("only", "rows", "json", "markdown"):
            command += [f"--{item.name}", str(value)]
    log.info("%s ...", name)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        killed = done.returncode == -signal.SIGKILL  # which is how Linux ends what takes too much memory
        return {"failed": "out of memory" if killed or "OutOfMemory" in last else last}
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def table(args: BenchmarkArgs, results: Mapping[str, Mapping[str, Any]]) -> str:
    """Lay the rows out as Markdown, each with its ratio to the first that could be measured.

    On a CPU the ratio of times is that of its threads' work, which other programs disturb less.
    """
    size = SIZES[args.size]
    measured = {name: row for name, row in results.items() if "seconds" in row}
    if not measured:
        return "Nothing could be measured: " + "; ".join(f"{name}: {row['failed']}" for name, row in results.items())
    first, base = next(iter(measured.items()))
    resolution = args.resolution or size.resolution
    compared = "seconds" if base["device"] == "cuda" else "cpu_seconds"
    lines = [
        f"One training step, {args.size} size, batch {args.batch or size.batch} at {resolution} x {resolution}, "
        f"{base['where']}, PyTorch {base['torch']}; ratios to {first}.",
        "",
        "| row | flags | seconds | CPU seconds | ratio | peak MiB | ratio |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for name, row in results.items():
        shown = f"`{' '.join(ROWS[name].flags)}`" if ROWS[name].flags else "-"
        if "failed" in row:
            lines.append(f"| {name} | {shown} | {row['failed']} | | | | |")
            continue
        ratios = [f"{row[key] / base[key]:.2f}" for key in (compared, "bytes")]
        lines.append(
            f"| {name} | {shown} | {row['seconds']:.3f} | {row['cpu_seconds']:.3f} | {ratios[0]} | "
            f"{row['bytes'] / 2**20:,.0f} | {ratios[1]} |"
        )
    return "\n".join([*lines, "", *([PAPER] if args.size == "full" else [])]).rstrip()


if __name__ == "__main__":
    run_main(main)
