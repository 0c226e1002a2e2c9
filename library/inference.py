"""What `inference.py` does: flags in, results on disk."""

import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.cli import is_main_process, process_count, process_rank
from library.errors import UserError
from library.fingerprint import fingerprints
from library.flags import flag_values
from library.flux.text import EMPTY_PROMPT
from library.images import read_depth, read_rgb
from library.inference_args import INPUT_FLAGS, InferenceArgs
from library.pipeline import GUIDANCE_SCALE, Pipeline
from library.results import file_hash, name_from, save_result, versions
from library.sizes import MAX_ASPECT, is_stretched, is_too_thin
from library.tasks import TASKS
from library.weight_paths import WeightPaths, weight_paths
from library.writable import require_writable, writing

logger = logging.getLogger(__name__)

_ROOM = f"_seed{2**63}_99_depth_color.png"  # the longest end that a result's name can have


def run_inference(args: InferenceArgs) -> Iterator[Path]:
    """Make and save one result for each seed, yielding each record's path as soon as it is written.

    Several launched processes share the seeds among them. Raises `UserError` for whatever the flags or files get wrong.
    """
    inputs = read_inputs(args)
    paths = weight_paths(args)
    device = args.torch_device()
    dtype = args.torch_dtype(device)
    if dtype == torch.float32 and (args.full_bf16 or args.mixed_precision != "no"):
        logger.info("On the CPU: computing in float32 (--device cpu --full_bf16 asks for bf16)")
    pipeline = Pipeline(
        paths,
        device=device,
        dtype=dtype,
        blocks_to_swap=args.blocks_to_swap,
        attention=args.attention,
        base_precision=args.base_precision,
    )
    if args.guidance_scale is not None and not pipeline.config.guidance_embed:
        logger.warning("--guidance_scale %g has no effect: this model has no guidance embedding", args.guidance_scale)
    record = _record(args, paths, pipeline)
    folder = args.output_dir / args.gen_type
    place = {
        "told": f"--output_dir {args.output_dir}",
        "remedy": "make room, or choose another folder or --output_name",
    }
    require_writable(folder / f"{_name(args)}{_ROOM}", **place)
    seeds = args.seed[process_rank() :: process_count()]
    progress = _StepLine(len(seeds) * record["steps"])
    for seed in seeds:
        (result,) = pipeline.run(
            args.gen_type,
            **inputs,
            prompt=args.text_prompt,
            seeds=(seed,),
            steps=args.steps,
            guidance_scale=args.guidance_scale,
            size=None if args.output_resolution is None else (args.output_resolution[1], args.output_resolution[0]),
            processing_resolution=args.processing_resolution,
            condition_noise=args.condition_noise,
            on_step=progress.step,
        )
        rows, columns = result.depth_hw.shape
        with writing(**place):
            path = save_result(
                folder,
                name=f"{_name(args)}_seed{seed}",
                result=result,
                record={**record, "width": columns, "height": rows},
            )
        yield path


def read_inputs(args: InferenceArgs) -> dict[str, Tensor]:
    """Read what the task is given, as `Pipeline.run` names it."""
    if args.input_image is not None:
        inputs = {"image": read_rgb(args.input_image)}
    elif args.input_depth is not None:
        inputs = {"depth": read_depth(args.input_depth, kind=args.depth_kind)}
    else:
        return {}
    ((name, values),) = inputs.items()
    height, width = values.shape[-2:]
    scaled = args.processing_resolution != 0 and (args.processing_resolution or args.output_resolution is None)
    if scaled and is_too_thin(height, width):
        raise UserError(
            f"--input_{name} {args.given_path}: is {width} x {height} pixels, and at most {MAX_ASPECT} times as long "
            "as wide is scaled to the model's size; cut it, or give --processing_resolution 0 or --output_resolution"
        )
    if args.output_resolution is not None and is_stretched((height, width), args.output_resolution[::-1]):
        logger.warning(
            "--output_resolution %d %d: the input is %d x %d pixels, of another aspect; it is stretched",
            *args.output_resolution, width, height,
        )  # fmt: skip
    return inputs


def _name(args: InferenceArgs) -> str:
    if args.output_name is not None:
        return args.output_name
    given = args.given_path
    return name_from(args.text_prompt or "") if given is None else given.stem


def _record(args: InferenceArgs, paths: WeightPaths, pipeline: Pipeline) -> dict[str, Any]:
    """Return what made the results, all but the seed and the size."""
    given = args.given_path
    weights: dict[str, Path] = {name: getattr(paths, name) for name in args.weight_paths()}
    return {
        "task": args.gen_type,
        "prompt": args.text_prompt or EMPTY_PROMPT,
        **{name: None if getattr(args, name) is None else str(getattr(args, name)) for name in INPUT_FLAGS.values()},
        "input_sha256": None if given is None else file_hash(given),
        "given": TASKS[args.gen_type].given,
        "steps": args.steps or pipeline.variant.steps,
        "guidance_scale": (
            None
            if not pipeline.config.guidance_embed
            else GUIDANCE_SCALE
            if args.guidance_scale is None
            else args.guidance_scale
        ),
        "condition_noise": args.condition_noise,
        "variant": pipeline.variant.name,
        "depth_transform": pipeline.depth_transform,
        "weights": {name: str(path) for name, path in weights.items()},
        "weights_fingerprint": fingerprints(weights),
        "device": pipeline.device.type,
        "dtype": str(pipeline.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "flags": flag_values(args),
    }


class _StepLine:
    """One line on a terminal that counts the steps and says the time left; nothing where no terminal looks on."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.done = 0
        self.shown = is_main_process() and sys.stderr.isatty()
        self.start: float | None = None

    def step(self, done: int) -> None:
        """Count one step; `done` counts those of one result only."""
        self.done += 1
        now = time.monotonic()
        if self.start is None:
            self.start = now  # the first step carries what is done once; the rest tells the pace
        elif self.shown:
            left = (now - self.start) / (self.done - 1) * (self.total - self.done)
            sys.stderr.write(
                f"\rstep {self.done} of {self.total}, {left:.0f} s left " + ("\n" * (self.done == self.total))
            )
            sys.stderr.flush()
