"""Write synthetic scenes as a prepared image folder: images, disparity, captions, metric depth and records.

    python dataset/make_scenes.py --output FOLDER --count 1000 --size 128 --seed 0

A sample that is complete is skipped, so a broken run goes on where it stopped; its record is written last.
"""

import argparse
import logging
import sys
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dataset.layout import Layout, sample_name
from dataset.synthetic import GENERATOR_VERSION, render_batch
from library.errors import UserError
from library.files import write_atomically, write_json, write_text

log = logging.getLogger(__name__)

_BATCH = {"cpu": 8, "cuda": 64}
_REPORT_SECONDS = 10.0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, metavar="FOLDER", help="the prepared image folder to fill")
    parser.add_argument("--count", type=int, required=True, help="how many scenes")
    parser.add_argument("--size", type=int, default=128, help="side of the pictures in pixels (default 128)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the scenes (default 0)")
    parser.add_argument("--start", type=int, default=0, help="index of the first scene (default 0)")
    parser.add_argument("--workers", type=int, default=1, help="processes that render, on a CPU (default 1)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    args = parser.parse_args(argv)
    for flag, least in (("count", 1), ("size", 16), ("seed", 0), ("start", 0), ("workers", 1)):
        if getattr(args, flag) < least:
            raise UserError(f"--{flag} {getattr(args, flag)}: must be {least} or more")
    if args.device not in _BATCH:
        raise UserError(f"--device {args.device}: must be cpu or cuda")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA device was found; use --device cpu")
    if args.device == "cuda" and args.workers > 1:
        raise UserError(f"--workers {args.workers}: one process renders on a GPU; leave it at 1")
    if Path(args.output).exists() and not Path(args.output).is_dir():
        raise UserError(f"--output {args.output}: is a file; name a folder")
    return args


def _save(layout: Layout, seed: int, indices: list[int], size: int, device: str) -> int:
    """Render some scenes and write them; the record comes last and marks the sample as complete."""
    batch = render_batch(seed, indices, size, device)
    rgb_Bhw3 = (batch.rgb_B3hw * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    metric_Bhw, disparity_Bhw = batch.metric_Bhw.cpu().numpy(), batch.disparity_Bhw.cpu().numpy()
    for b, index in enumerate(indices):
        name = sample_name(index)
        with write_atomically(layout.image(name)) as path:
            Image.fromarray(rgb_Bhw3[b]).save(path, compress_level=1)
        for target, values in ((layout.depthmap(name), disparity_Bhw[b]), (layout.metric(name), metric_Bhw[b])):
            with write_atomically(target) as path:
                np.save(path, np.ascontiguousarray(values))
        write_text(layout.prompt(name), batch.captions[b] + "\n")
        write_json(layout.scene(name), batch.records[b])
    return len(indices)


def _save_alone(root: str, seed: int, indices: list[int], size: int) -> int:
    """One worker process's share: a single thread each."""
    torch.set_num_threads(1)
    return _save(Layout(root), seed, indices, size, "cpu")


def _check_same_kind(layout: Layout, name: str, *, size: int, seed: int) -> None:
    """A folder holds scenes of one seed, size and generator: mixing them would go unnoticed later."""
    import json

    record = json.loads(layout.scene(name).read_text(encoding="utf-8"))
    for flag, found, wanted in (("--seed", record["seed"], seed), ("--size", record["size"], size)):
        if found != wanted:
            raise UserError(f"{flag} {wanted}: {layout.root} holds scenes of {flag[2:]} {found}; choose another --output")
    if record["generator_version"] != GENERATOR_VERSION:
        raise UserError(
            f"--output {layout.root}: holds scenes of generator {record['generator_version']}, "
            f"this is {GENERATOR_VERSION}; choose another folder"
        )


def _results(layout: Layout, args: argparse.Namespace, batches: list[list[int]]) -> Iterator[int]:
    """Sizes of the batches as they are done."""
    if args.workers == 1:
        for indices in batches:
            yield _save(layout, args.seed, indices, args.size, args.device)
        return
    with ProcessPoolExecutor(args.workers) as pool:
        waiting: set[Future[int]] = set()
        for indices in batches:
            waiting.add(pool.submit(_save_alone, str(layout.root), args.seed, indices, args.size))
            if len(waiting) >= 4 * args.workers:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        yield from (future.result() for future in waiting)


def main(argv: list[str] | None = None) -> None:
    """Render what is missing of the scenes asked for."""
    args = _parse(argv)
    layout = Layout(args.output)
    wanted = range(args.start, args.start + args.count)
    there = {path.stem for path in layout.scenes.glob("*.json")} if layout.scenes.is_dir() else set()
    if there:
        _check_same_kind(layout, min(there), size=args.size, seed=args.seed)
    missing = [index for index in wanted if sample_name(index) not in there]
    log.info("%d scenes to render into %s, %d are there", len(missing), args.output, args.count - len(missing))
    step = _BATCH[args.device]
    batches = [missing[i : i + step] for i in range(0, len(missing), step)]
    begin = reported = time.monotonic()
    done = 0
    for number in _results(layout, args, batches):
        done += number
        now = time.monotonic()
        if now - reported > _REPORT_SECONDS or done == len(missing):
            reported = now
            each = (now - begin) / done
            log.info("%d of %d, %.0f ms each, %.0f s left", done, len(missing), each * 1e3, each * (len(missing) - done))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    try:
        main()
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(2)
