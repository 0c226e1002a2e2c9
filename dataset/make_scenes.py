"""Write synthetic scenes as a prepared image folder: images, disparity, captions, metric depth and records.

    python dataset/make_scenes.py --output FOLDER --count 1000 --size 128 --seed 0

A sample that is complete is skipped, so a broken run goes on where it stopped; its record is written last.
"""

import json
import logging
import sys
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dataset.layout import Layout, sample_name
from dataset.synthetic import GENERATOR_VERSION, render_batch
from library.cli import run_main, say, set_threads
from library.errors import UserError
from library.files import write_atomically, write_json, write_text
from library.flags import Flags, flag, parse

logger = logging.getLogger(__name__)

_BATCH = {"cpu": 8, "cuda": 64}
_REPORT_SECONDS = 10.0


@dataclass(frozen=True, kw_only=True)
class ScenesArgs(Flags):
    """Flags of this command."""

    output: Path = flag(help="the prepared image folder to fill", metavar="FOLDER")
    count: int = flag(help="how many scenes", minimum=1)
    size: int = flag(128, help="side of the pictures in pixels", minimum=16)
    seed: int = flag(0, help="seed of the scenes; 1000001 is kept for evaluation", minimum=0)
    start: int = flag(0, help="index of the first scene", minimum=0)
    workers: int = flag(1, help="processes that render, on a CPU", minimum=1)
    device: str = flag("cpu", help="what renders", choices=tuple(_BATCH))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: no CUDA device was found; use --device cpu")
        if self.device == "cuda" and self.workers > 1:
            raise UserError(f"--workers {self.workers}: one process renders on a GPU; leave it at 1")
        if self.output.exists() and not self.output.is_dir():
            raise UserError(f"--output {self.output}: is a file; name a folder")


def save_scenes(layout: Layout, *, seed: int, indices: list[int], size: int, device: str = "cpu") -> int:
    """Render some scenes and write them; the record comes last and marks the sample as complete."""
    batch = render_batch(seed, indices, size, device)
    rgb_Bhw3 = (batch.rgb_B3hw * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    metric_Bhw, disparity_Bhw = batch.metric_Bhw.cpu().numpy(), batch.disparity_Bhw.cpu().numpy()
    for b, index in enumerate(indices):
        name = sample_name(index)
        with write_atomically(layout.image(name)) as path:
            Image.fromarray(rgb_Bhw3[b]).save(path, compress_level=1)
        for target, values_hw in ((layout.depthmap(name), disparity_Bhw[b]), (layout.metric(name), metric_Bhw[b])):
            with write_atomically(target) as path:
                np.save(path, np.ascontiguousarray(values_hw))
        write_text(layout.prompt(name), batch.captions[b] + "\n")
        write_json(layout.scene(name), batch.records[b])
    return len(indices)


def _save_in_worker(root: Path, seed: int, indices: list[int], size: int) -> int:
    """A worker process's share, on one thread."""
    torch.set_num_threads(1)
    return save_scenes(Layout(root), seed=seed, indices=indices, size=size)


def _check_same_kind(layout: Layout, name: str, args: ScenesArgs) -> None:
    """A folder holds scenes of one seed, size and generator: a mixture would go unnoticed later."""
    record = json.loads(layout.scene(name).read_text(encoding="utf-8"))
    where = f"--output {args.output}: holds scenes of"
    if record["generator_version"] != GENERATOR_VERSION:
        found = record["generator_version"]
        raise UserError(f"{where} generator {found}, this is {GENERATOR_VERSION}; choose another folder")
    for key, wanted in (("seed", args.seed), ("size", args.size)):
        if record[key] != wanted:
            raise UserError(f"{where} --{key} {record[key]}, not {wanted}; choose another folder")


def _results(layout: Layout, args: ScenesArgs, batches: list[list[int]]) -> Iterator[int]:
    """Sizes of the batches as they are done."""
    if args.workers == 1:
        for indices in batches:
            yield save_scenes(layout, seed=args.seed, indices=indices, size=args.size, device=args.device)
        return
    # Forking a process in which torch has started its threads can hang.
    with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool:
        waiting: set[Future[int]] = set()
        for indices in batches:
            waiting.add(pool.submit(_save_in_worker, args.output, args.seed, indices, args.size))
            if len(waiting) >= 4 * args.workers:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        yield from (future.result() for future in waiting)


def make_scenes(args: ScenesArgs) -> int:
    """Render what is missing of the scenes asked for; returns how many that were."""
    layout = Layout(args.output)
    there = {path.stem for path in layout.scenes.glob("*.json") if not path.name.startswith(".")}
    if there:
        _check_same_kind(layout, min(there), args)
    missing = [i for i in range(args.start, args.start + args.count) if sample_name(i) not in there]
    step = _BATCH[args.device]
    batches = [missing[i : i + step] for i in range(0, len(missing), step)]
    begin = reported = time.monotonic()
    done = 0
    for number in _results(layout, args, batches):
        done += number
        now = time.monotonic()
        if now - reported > _REPORT_SECONDS:
            reported = now
            each = (now - begin) / done
            left = each * (len(missing) - done)
            logger.info("%d of %d scenes, %.0f ms each, %.0f s left", done, len(missing), each * 1e3, left)
    return len(missing)


def main() -> None:
    """Read the flags and fill the folder."""
    args = parse(sys.argv[1:], ScenesArgs, description="Write synthetic scenes as a prepared image folder")
    set_threads(1)  # a frame is too small to share: more processes, not threads, make it faster
    made = make_scenes(args)
    say(f"{args.count} scenes in {args.output}: {made} rendered, {args.count - made} were there")


if __name__ == "__main__":
    run_main(main)
