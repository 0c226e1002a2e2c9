"""Speed of the data: pictures taken in by preprocessing step 1, encoding in step 2, reading the cached set in training.

Everything is made here, of random pictures and features; nothing is downloaded. Reading is compared with plain
sequential reading of the very same files, in turns, from the disk (their pages are dropped from memory first) and from
memory. `python benchmarks/data.py --help`
"""

import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image

from dataset.cache import CachedPair, claim_folder, pair_to_bytes
from dataset.encode_folder import FolderEncoder
from dataset.intake import FitRule, Intake
from dataset.jointdit_dataset import CachedPairs, PicturePairs
from dataset.layout import Layout, sample_name
from dataset.shards import write_shard
from dataset.sources import list_sources
from library.args import Flags, flag, parse
from library.cli import run_main, say, set_threads
from library.data_order import DataOrder, MicroBatches
from library.encoding import LatentEncoder
from library.errors import UserError
from library.files import write_json, write_text
from library.flux.autoencoder import Autoencoder
from library.flux.text import TextFeatures
from library.flux.variants import AutoencoderConfig
from library.flux.weights import load_autoencoder
from library.images import write_rgb
from library.loading import load_batches
from library.randomness import generator_for
from library.weight_paths import embedded_files

META = {"ae": "random", "depth_transform": "none", "text": True}
MIDDLING = AutoencoderConfig(ch=64)


@dataclass(frozen=True, kw_only=True)
class DataArgs(Flags):
    """Flags of this benchmark."""

    samples: int = flag(256, help="cached samples of full size (4.5 MB each) to read", minimum=8)
    originals: int = flag(100, help="pictures of 1024 x 768 for step 1 to take in; 0 leaves it away", minimum=0)
    pictures: int = flag(8, help="pairs to encode with each autoencoder; 0 measures reading only", minimum=0)
    rounds: int = flag(3, help="rounds of reading; medians are told", minimum=1)
    batch_size: int = flag(4, help="samples a batch", minimum=1)
    workers: tuple[int, ...] = flag((0, 1, 2), help="numbers of reader threads", minimum=0)
    num_threads: int = flag(1, help="CPU threads", minimum=1)
    folder: Path | None = flag(None, help="where the files go meanwhile (default: the system's)", metavar="FOLDER")
    json: Path | None = flag(None, help="write the figures to this file too", metavar="FILE")
    markdown: Path | None = flag(None, help="write the table to this file too", metavar="FILE")

    def __post_init__(self) -> None:
        super().__post_init__()
        needed = self.batch_size * (2 + 2 * max(self.workers))
        if self.samples < needed:
            raise UserError(f"--samples {self.samples}: with these workers and batches at least {needed} are needed")


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One way of reading: samples and MB (10^6 bytes) a second, and its share of plain reading's pace."""

    files: str
    source: str
    way: str
    samples: float
    megabytes: float
    share: float


def write_pictures(folder: Path, *, count: int, size: int) -> None:
    """Fill a folder with random pictures and depth maps."""
    layout = Layout(folder)
    layout.depthmaps.mkdir(parents=True)
    for number in range(count):
        generator = generator_for("benchmark", number)
        name = sample_name(number)
        write_rgb(layout.image(name), torch.rand(3, size, size, generator=generator))
        np.save(layout.depthmap(name), torch.rand(size, size, generator=generator).numpy())
        write_text(layout.prompt(name), f"picture {number}\n")


def encoding_rate(autoencoder: Autoencoder, *, count: int, size: int, root: Path) -> float:
    """Pairs a second that step 2 encodes and writes, text left out."""
    folder = root / f"pictures_{size}"
    write_pictures(folder, count=count + 1, size=size)
    pairs = PicturePairs(folder, depth_transform="none")
    stamp = claim_folder(pairs.layout.cache_meta, META | {"text": False}, flag="--folder")
    encoder = FolderEncoder(
        pairs=pairs,
        latents=LatentEncoder(autoencoder=autoencoder, posterior="sample"),
        prompts=None,
        batch_size=1,
        dtype=torch.bfloat16,
        stamp=stamp,
    )
    for _ in encoder.encode(encoder.read([pairs.names[0]])):
        pass  # the first one also prepares the kernels
    begin = time.perf_counter()
    encoder.run()
    return (count + 1) / (time.perf_counter() - begin)


def write_samples(folder: Path, *, count: int, shard_size: int | None) -> list[Path]:
    """Fill a cache with samples of the released model's size and return its files.

    512 x 512 pixels, 512 T5 tokens, bf16.
    """
    layout = Layout(folder)
    stamp = claim_folder(layout.cache_meta, META, flag="--folder")
    generator = generator_for("benchmark")
    text = TextFeatures(
        tokens_BLD=torch.randn(1, 512, 4096, generator=generator), pooled_BD=torch.randn(1, 768, generator=generator)
    )
    latent = torch.randn(16, 64, 64, generator=generator)
    pair = CachedPair(rgb_Chw=latent, depth_Chw=-latent, text=text, captions=("a picture",))
    content = pair_to_bytes(pair, dtype=torch.bfloat16, stamp=stamp)
    names = [sample_name(number) for number in range(count)]
    if shard_size is None:
        for name in names:
            layout.cached(name).write_bytes(content)
        return [layout.cached(name) for name in names]
    shards = range(-(-count // shard_size))
    for number in shards:
        members = names[number * shard_size : (number + 1) * shard_size]
        write_shard(layout, number, {name: (content, 64, 64) for name in members}, stamp=stamp)
    return [layout.shard(number) for number in shards]


def forget(files: Iterable[Path]) -> None:
    """Drop the pages of files from memory, so that the next reading comes from the disk."""
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def plain_seconds(files: Iterable[Path]) -> float:
    """How long reading files one after the other takes."""
    begin = time.perf_counter()
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 22):
                pass
    return time.perf_counter() - begin


def loader_seconds(folder: Path, *, workers: int, batch_size: int) -> float:
    """How long the loader takes for an epoch in the order of training, judged by its pace once it runs."""
    pairs = CachedPairs(folder, depth_transform="none")
    order = DataOrder(count=len(pairs.names), batch_size=batch_size)
    steps = order.steps_for(1)
    begin, running = 0.0, 1 + 2 * workers  # so many batches are read ahead before the pace is even
    micro_batches = MicroBatches(order=order, start=0, stop=steps)
    for number, _ in enumerate(load_batches(pairs, micro_batches, workers=workers, pin=False), start=1):
        if number == running:
            begin = time.perf_counter()
    return (time.perf_counter() - begin) * steps / (steps - running)


def reading_rates(folder: Path, files: list[Path], args: DataArgs) -> Iterator[Row]:
    """Rows of the reading table, for one kind of files."""
    megabytes = sum(path.stat().st_size for path in files) / 1e6
    ways: dict[str, Callable[[], float]] = {"plain": partial(plain_seconds, files)}
    for workers in args.workers:
        read = partial(loader_seconds, folder, workers=workers, batch_size=args.batch_size)
        ways[f"loader, {workers} workers"] = read
    for cold in (True, False):
        times: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(args.rounds):
            for way, measure in ways.items():
                if cold:
                    forget(files)
                times[way].append(measure())
        for way, taken in times.items():
            share = statistics.median(plain / each for plain, each in zip(times["plain"], taken, strict=True))
            typical = statistics.median(taken)
            yield Row(
                files="tar shards" if files[0].suffix == ".tar" else "one a sample",
                source="disk" if cold else "memory",
                way=way,
                samples=args.samples / typical,
                megabytes=megabytes / typical,
                share=share,
            )


def table(rows: Iterable[Row]) -> str:
    """The reading table in Markdown."""
    lines = ["| files | from | way | samples/s | MB/s | of plain reading |", "|---|---|---|---:|---:|---:|"]
    lines += [
        f"| {row.files} | {row.source} | {row.way} | {row.samples:.0f} | {row.megabytes:.0f} | {row.share:.2f} |"
        for row in rows
    ]
    return "\n".join(lines)


def measure_intake(root: Path, *, count: int) -> dict[str, float]:
    """Pictures a second that step 1 reads, scales to 512 x 512 and writes: JPEGs of smooth noise at 1024 x 768."""
    root.mkdir(parents=True)
    for index in range(count):
        noise_3hw = torch.rand(3, 48, 64, generator=generator_for(0, "original", index))
        pixels_hw3 = (noise_3hw.permute(1, 2, 0) * 255).byte().numpy()
        Image.fromarray(pixels_hw3).resize((1024, 768), Image.Resampling.BICUBIC).save(root / f"{index:05d}.jpg")
    layout = Layout(root)
    intake = Intake(layout, rule=FitRule(resolution=512), originals="keep")
    begin = time.perf_counter()
    for source in list_sources(layout):
        intake.take(source)
    rate = count / (time.perf_counter() - begin)
    say(f"1024 x 768 JPEG to 512 x 512 PNG: {rate:.1f} pictures/s taken in")
    return {"1024 x 768 JPEG to 512 x 512 PNG": rate}


def measure_encoding(root: Path, *, count: int) -> dict[str, float]:
    """Pairs a second that step 2 encodes, by autoencoder and size."""
    embedded = load_autoencoder(embedded_files(("ae",))["ae"])
    torch.manual_seed(0)
    middling = Autoencoder(MIDDLING).eval().requires_grad_(False)
    rates = {}
    for name, model, size in (("embedded", embedded, 128), ("embedded", embedded, 512), ("middling", middling, 256)):
        rate = encoding_rate(model, count=count, size=size, root=root / name)
        rates[f"{name} autoencoder, {size} x {size}"] = rate
        say(f"{name} autoencoder, {size} x {size}: {rate:.2f} pairs/s encoded")
    return rates


def main() -> None:
    """Measure, and print a table."""
    args = parse(sys.argv[1:], DataArgs, description="Measure encoding and reading of training data")
    set_threads(args.num_threads)
    with TemporaryDirectory(dir=args.folder, prefix="jointdit-benchmark-") as name:
        root = Path(name)
        intake = measure_intake(root / "originals", count=args.originals) if args.originals else {}
        rates = measure_encoding(root, count=args.pictures) if args.pictures else {}
        rows = []
        for kind, shard_size in (("files", None), ("shards", 32)):
            files = write_samples(root / kind, count=args.samples, shard_size=shard_size)
            rows += reading_rates(root / kind, files, args)
    say(table(rows))
    if args.markdown is not None:
        write_text(args.markdown, table(rows) + "\n")
    if args.json is not None:
        reading = [asdict(row) for row in rows]
        figures = {"pictures_taken_in_per_second": intake, "encoded_pairs_per_second": rates, "reading": reading}
        write_json(args.json, figures)


if __name__ == "__main__":
    run_main(main)
