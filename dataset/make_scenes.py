"""Write synthetic scenes as a prepared image folder: images, disparity, captions, metric depth, objects and records.

    python dataset/make_scenes.py --output FOLDER --count 1000 --size 128 --seed 0 --workers 4

A scene's files are a function of seed, index and size alone, whatever the number of processes. A sample that is
complete is skipped, so a broken run goes on where it stopped; its record is written last. Launched several times over
(accelerate launch, torch.distributed.run), each process makes its own share of the indices.
"""

import json
import logging
import os
import sys
import time
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dataset.layout import Layout, sample_name
from dataset.synthetic import GENERATOR_VERSION, HELD_OUT_SEED, render_batch
from dataset.workers import map_in_workers
from library.cli import local_rank, process_count, process_rank, run_main, say, set_threads
from library.errors import UserError
from library.files import left_overs, write_atomically, write_json, write_text
from library.flags import Flags, flag, parse

logger = logging.getLogger(__name__)

_BATCH = {"cpu": 8, "cuda": 64}  # scenes of 128 px at a time, fewer of larger ones
_LARGEST = 1024  # a scene of this size takes 1 GB of memory and more than a second
_REPORT_SECONDS = 10.0


@dataclass(frozen=True, kw_only=True)
class ScenesArgs(Flags):
    """Flags of this command."""

    output: Path = flag(help="the prepared image folder to fill", metavar="FOLDER")
    count: int = flag(help="how many scenes", minimum=1)
    size: int = flag(128, help="side of the pictures in pixels", minimum=16, maximum=_LARGEST)
    seed: int = flag(0, help=f"seed of the scenes; {HELD_OUT_SEED} is kept for evaluation", minimum=0)
    start: int = flag(0, help="index of the first scene", minimum=0)
    workers: int = flag(1, help="processes that each launched process renders with, on a CPU", minimum=1)
    device: str = flag("cpu", help="what renders", choices=tuple(_BATCH))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: no CUDA device was found; use --device cpu")
        if self.device == "cuda" and self.workers > 1:
            raise UserError(f"--workers {self.workers}: one process renders on a GPU; leave it at 1")
        if self.output.exists() and not self.output.is_dir():
            raise UserError(f"--output {self.output}: is a file; name a folder")


def save_scenes(indices: list[int], *, layout: Layout, seed: int, size: int, device: str = "cpu") -> int:
    """Render some scenes and write them; the record comes last and marks the sample as complete."""
    batch = render_batch(seed, indices, size, device)
    rgb_Bhw3 = (batch.rgb_B3hw * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    metric_Bhw, disparity_Bhw = batch.metric_Bhw.cpu().numpy(), batch.disparity_Bhw.cpu().numpy()
    instance_Bhw = (batch.ids_Bhw + 1).byte().cpu().numpy()
    for b, index in enumerate(indices):
        name = sample_name(index)
        for target, pixels in ((layout.image(name), rgb_Bhw3[b]), (layout.instance_map(name), instance_Bhw[b])):
            with write_atomically(target) as path:
                Image.fromarray(pixels).save(path, compress_level=1)
        for target, values_hw in ((layout.depthmap(name), disparity_Bhw[b]), (layout.metric(name), metric_Bhw[b])):
            with write_atomically(target) as path:
                np.save(path, np.ascontiguousarray(values_hw))
        write_text(layout.prompt(name), batch.captions[b] + "\n")
        write_json(layout.scene(name), batch.records[b])
    return len(indices)


def _check_same_kind(layout: Layout, name: str, args: ScenesArgs) -> None:
    """A folder holds scenes of one seed, size and generator: a mixture would go unnoticed later."""
    try:
        record = json.loads(layout.scene(name).read_text(encoding="utf-8"))
        found = {key: record[key] for key in ("generator_version", "seed", "size")}
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"--output {layout.scene(name)}: is no record of a scene; delete it, or choose another folder"
        ) from None
    where = f"--output {args.output}: holds scenes of"
    if found["generator_version"] != GENERATOR_VERSION:
        raise UserError(
            f"{where} generator {found['generator_version']}, this is {GENERATOR_VERSION}; choose another folder"
        )
    for key, wanted in (("seed", args.seed), ("size", args.size)):
        if found[key] != wanted:
            raise UserError(f"{where} --{key} {found[key]}, not {wanted}; choose another folder")


def _find_missing(layout: Layout, args: ScenesArgs) -> bytearray:
    """One byte for each index asked for: 1 where the scene is still to be made by this process.

    The folder is read as a stream, so that millions of scenes take megabytes.
    """
    missing = bytearray(args.count)
    for offset in range((process_rank() - args.start) % process_count(), args.count, process_count()):
        missing[offset] = 1
    if layout.scenes.is_dir():
        checked = False
        with os.scandir(layout.scenes) as entries:
            for entry in entries:
                name = entry.name.removesuffix(".json")
                if not name.isdecimal() or sample_name(int(name)) != name:
                    continue
                if not checked:
                    _check_same_kind(layout, name, args)
                    checked = True
                if 0 <= int(name) - args.start < args.count:
                    missing[int(name) - args.start] = 0
    return missing


def _remove_leftovers(layout: Layout, args: ScenesArgs, missing: bytearray) -> None:
    """Delete half-written files that a killed run left of scenes which only this process is about to make."""
    samples = (layout.processed_images, layout.depthmaps, layout.text_prompts)
    for folder in (*samples, layout.metric_depth, layout.instances, layout.scenes):
        for path in left_overs(folder):
            name = path.name[1:].split(".")[0]
            if name.isdecimal() and 0 <= int(name) - args.start < args.count and missing[int(name) - args.start]:
                path.unlink(missing_ok=True)


def make_scenes(args: ScenesArgs) -> int:
    """Render what is missing of this process's share of the scenes asked for; returns how many that were."""
    layout = Layout(args.output)
    missing = _find_missing(layout, args)
    total = sum(missing)
    if not total:
        return 0
    if args.seed == HELD_OUT_SEED:
        logger.warning("--seed %d: these scenes are kept for evaluation; don't train on them", args.seed)
    _remove_leftovers(layout, args, missing)
    at_once = max(1, _BATCH[args.device] * 128**2 // max(args.size, 128) ** 2)
    indices = (args.start + offset for offset, wanted in enumerate(missing) if wanted)
    batches = iter(lambda: list(islice(indices, at_once)), [])
    device = f"cuda:{local_rank() % torch.cuda.device_count()}" if args.device == "cuda" else args.device
    save = partial(save_scenes, layout=layout, seed=args.seed, size=args.size, device=device)
    begin = reported = time.monotonic()
    done = 0
    for number in map_in_workers(save, batches, workers=args.workers):
        done += number
        now = time.monotonic()
        if now - reported > _REPORT_SECONDS:
            reported = now
            each = (now - begin) / done
            left = each * (total - done)
            logger.info("%d of %d scenes, %.0f ms each, %.0f s left", done, total, each * 1e3, left)
    return total


def main() -> None:
    """Read the flags and fill the folder."""
    args = parse(sys.argv[1:], ScenesArgs, description="Write synthetic scenes as a prepared image folder")
    set_threads(1)  # a frame is too small to share: more processes, not threads, make it faster
    made = make_scenes(args)
    if process_count() > 1:
        say(f"{args.count} scenes in {args.output}: {made} rendered by the first of {process_count()} processes")
    else:
        say(f"{args.count} scenes in {args.output}: {made} rendered, {args.count - made} were there")


if __name__ == "__main__":
    run_main(main)
