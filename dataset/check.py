"""Say in one screen what is in a prepared image folder, and whether training would run on it.

    python -m dataset.check FOLDER

Every image, depth map, caption and cached sample is read, through the readers that training uses. Exit status 0:
training would run; 1: it would fail, with the reasons; 2: a wrong flag. What train.py is told by flags
(--depth_transform, --max_bad_samples, the weights, ...) has the same names and defaults here.
"""

import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from dataset.check_report import Report, Verdict
from dataset.contact_sheet import SheetRow, write_contact_sheet
from dataset.inspection import (
    BAD,
    FATAL,
    Tokens,
    inspect_cached,
    inspect_pictures,
    open_cached,
    open_pictures,
)
from dataset.jointdit_dataset import CachedPairs, PicturePairs, find_image, read_captions
from dataset.layout import Layout
from dataset.lone_files import note_lone_files
from dataset.tally import EXAMPLES, Tally, find_equal
from dataset.training_data import check_models
from dataset.workers import map_in_workers
from library.args import AutoencoderArgs, TextEncoderArgs, flag, parse
from library.cli import is_main_process, run_main, say
from library.errors import UserError
from library.files import write_json
from library.flux.text_weights import token_lengths
from library.images import read_depth, read_rgb
from library.modality import DEPTH_TRANSFORMS
from library.weight_paths import embedded_files

_AT_ONCE = 32  # samples of one task


@dataclass(frozen=True, kw_only=True)
class CheckArgs(TextEncoderArgs, AutoencoderArgs):
    """Flags of this command."""

    image_folder: Path = flag(help="the prepared folder; may be given without the flag's name", metavar="FOLDER")
    is_latent_training: bool | None = flag(
        None, help="judge training on the cache only; --no_is_latent_training: on the pictures only (default: on what "
        "is there)",
    )  # fmt: skip
    depth_transform: str = flag("none", help="as train.py will be given it", choices=DEPTH_TRANSFORMS)
    is_attnmask_training: bool = flag(False, help="as train.py will be given it")
    trust_cache: bool = flag(False, help="as train.py will be given it")
    max_bad_samples: int = flag(0, help="as train.py will be given it", minimum=0)
    workers: int = flag(1, help="processes that read", minimum=1)
    sheet: Path | None = flag(
        None, help="contact sheet to write, image | depth | caption (default: outputs/check/NAME.png)", metavar="X.png"
    )
    sheet_samples: int = flag(12, help="samples on it, spread over the folder; 0 writes none", minimum=0, maximum=200)
    json: Path | None = flag(None, help="write all figures to this file, too", metavar="X.json")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.image_folder.is_dir():
            raise UserError(f"--image_folder {self.image_folder}: no such folder")
        if self.sheet is not None and self.sheet.suffix.lower() != ".png":
            raise UserError(f"--sheet {self.sheet}: the contact sheet is a PNG; end its name in .png")

    @property
    def sheet_path(self) -> Path:
        """Where the contact sheet goes: not into the folder itself, whose pictures are counted."""
        return self.sheet or Path("outputs") / "check" / f"{self.image_folder.resolve().name or 'root'}.png"


def check_folder(args: CheckArgs) -> Report:
    """Read everything in the folder."""
    open_pictures.cache_clear()
    open_cached.cache_clear()
    layout = Layout(args.image_folder)
    tokens, tokens_of = find_tokens(args)
    pictures = partial(inspect_pictures, folder=args.image_folder, tokens=tokens)
    picture_names = names_of(lambda: open_pictures(args.image_folder))
    tally = inspect(pictures, len(picture_names), args, "image")
    transform = cached_transform(args)
    cached_names = names_of(lambda: open_cached(args.image_folder, transform))
    if cached_names:
        cached = partial(inspect_cached, folder=args.image_folder, depth_transform=transform)
        tally.merge(inspect(cached, len(cached_names), args, "cached sample"))
    note_copies(tally, picture_names)
    note_lone_files(tally, layout, picture_names, cached_names)
    verdicts = []
    if args.is_latent_training is not True and (picture_names or not cached_names):
        verdicts.append(judge_pictures(args, tally))
    if args.is_latent_training is True or (args.is_latent_training is None and layout.cache.is_dir()):
        verdicts.append(judge_cache(args, tally))
    return Report(
        folder=args.image_folder,
        tally=tally,
        images=len(picture_names),
        cached=len(cached_names),
        verdicts=verdicts,
        tokens=tokens,
        tokens_of=tokens_of,
        max_bad_samples=args.max_bad_samples,
    )


def note_copies(tally: Tally, names: Sequence[str]) -> None:
    """Note the images whose files are equal."""
    equal = find_equal(tally.digests)
    for first, later in equal[:EXAMPLES].tolist():
        tally.note("same_image", names[later], f"as {names[first]}")
    tally.counts["same_image"] = len(equal)


def inspect(work: Callable[[Sequence[int]], Tally], count: int, args: CheckArgs, unit: str) -> Tally:
    """Let the workers look at `count` samples, and add up what they find."""
    total = Tally()
    tasks = (range(start, min(start + _AT_ONCE, count)) for start in range(0, count, _AT_ONCE))
    with tqdm(total=count, unit=f" {unit}s", dynamic_ncols=True, disable=not count) as bar:
        for part, done in zip(map_in_workers(work, tasks, workers=args.workers), _steps(count), strict=True):
            total.merge(part)
            bar.update(done)
    return total


def _steps(count: int) -> Iterator[int]:
    return (min(_AT_ONCE, count - start) for start in range(0, count, _AT_ONCE))


def names_of(open_pairs: Callable[[], PicturePairs | CachedPairs]) -> Sequence[str]:
    """Names of the samples, none where there is nothing to open: the verdict says why."""
    try:
        return open_pairs().names
    except UserError:
        return ()


def cached_transform(args: CheckArgs) -> str:
    """The depth transform that a cache was made with, so that it can be looked at whatever the flag says."""
    for transform in (args.depth_transform, *DEPTH_TRANSFORMS):
        if names_of(lambda transform=transform: open_cached(args.image_folder, transform)):  # type: ignore[misc]
            return transform
    return args.depth_transform


def find_tokens(args: CheckArgs) -> tuple[Tokens, str]:
    """Which tokenizers count, and how they are called in the report."""
    embedded = embedded_files(("clip_l", "t5xxl"))
    clip_l, t5xxl = args.clip_l or embedded["clip_l"], args.t5xxl or embedded["t5xxl"]
    clip_length, t5_length = token_lengths(clip_l, t5xxl)
    own = [getattr(args, name) for name in ("clip_tokenizer", "clip_l", "t5_tokenizer", "t5xxl")]
    tokens = Tokens(
        clip=(args.clip_tokenizer, clip_l),
        t5=(args.t5_tokenizer, t5xxl),
        clip_length=clip_length,
        t5_length=args.t5xxl_max_token_length or t5_length,
    )
    ours = "the embedded model's tokenizer"
    clip, t5 = (str(a or f"that of {b}") if a or b else ours for a, b in (own[:2], own[2:]))
    return tokens, clip if clip == t5 else f"CLIP: {clip}; T5: {t5}"


def judge_pictures(args: CheckArgs, tally: Tally) -> Verdict:
    """Would training on the pictures run?"""
    reasons = []
    try:
        pairs = PicturePairs(
            args.image_folder, depth_transform=args.depth_transform, max_bad_samples=args.max_bad_samples
        )
        reasons += _sizes_lost(pairs, tally.readable["image"])
    except UserError as error:
        reasons.append(str(error))
    if tally.counts["bad"] > args.max_bad_samples:
        said = ("no_depth", "no_caption", "cached") if reasons else ("cached",)
        reasons += _first_said(tally, [kind for kind in BAD if kind not in said])
    reasons += _first_said(tally, ["overwritten"])
    return Verdict(mode="on the pictures", reasons=_unlike(reasons))


def judge_cache(args: CheckArgs, tally: Tally) -> Verdict:
    """Would training on the cache run?"""
    reasons = []
    try:
        pairs = CachedPairs(args.image_folder, depth_transform=args.depth_transform)
        reasons += _sizes_lost(pairs, tally.readable["cached"])
        check_models(args, pairs.meta)
    except UserError as error:
        reasons.append(str(error))
    if tally.counts["bad_cached"] > args.max_bad_samples:
        reasons += _first_said(tally, ["cached"])
    reasons += _first_said(tally, [kind for kind in FATAL if kind != "overwritten"])
    if len(tally.sizes.get("text", ())) > 1:
        reasons.append(f"--image_folder {args.image_folder}: the cached text features differ in size")
    return Verdict(mode="on the cache (--is_latent_training)", reasons=_unlike(reasons))


def _sizes_lost(pairs: PicturePairs | CachedPairs, readable: Counter[int]) -> list[str]:
    """A bad sample is replaced by others of its size: there must be one that can be read."""
    buckets = pairs.buckets if pairs.buckets is not None else torch.zeros(len(pairs.names), dtype=torch.int64)
    lost = [bucket for bucket in buckets.unique().tolist() if not readable[bucket]]
    names = [pairs.names[int((buckets == bucket).nonzero()[0])] for bucket in lost]
    return [f"--image_folder: no sample of the size of {name} can be read; repair it" for name in names[:EXAMPLES]]


def _first_said(tally: Tally, kinds: Sequence[str]) -> list[str]:
    """What the reader said of the first sample of each kind."""
    said = []
    for kind in kinds:
        for name, text in tally.examples.get(kind, [])[:1]:
            said.append(text if name in text else f"{text} ({name})" if text else f"{(BAD | FATAL)[kind]}: {name}")
    return said


def _unlike(reasons: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(" ".join(reason.split()) for reason in reasons))


def sheet_rows(layout: Layout, names: Sequence[str], count: int) -> list[SheetRow]:
    """Read samples spread evenly over the folder; what can't be read leaves its place empty."""
    rows = []
    for index in sorted({place * len(names) // count for place in range(count)}) if names else ():
        name = names[index]
        caption, rgb_3hw, disparity_hw = "", None, None
        try:
            rgb_3hw = read_rgb(find_image(layout, name))
            disparity_hw = read_depth(layout.depthmap(name))
            caption = "\n".join(read_captions(layout.prompt(name)))
        except UserError as error:
            caption = f"({error})"
        rows.append(SheetRow(name=name, caption=caption, rgb_3hw=rgb_3hw, disparity_hw=disparity_hw))
    return rows


@contextmanager
def warnings_left_out(name: str) -> Iterator[None]:
    """Within the block a logger tells of errors only."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def main() -> None:
    """Read the flags, look at the folder, print the report; exit status 1 if training would fail."""
    argv = sys.argv[1:]
    if argv and not argv[0].startswith("-"):
        argv = ["--image_folder", *argv]
    args = parse(argv, CheckArgs, description="Say what is in a prepared image folder and whether training would run")
    if not is_main_process():
        return  # --workers shares the work
    torch.set_num_threads(1)
    with warnings_left_out("dataset.jointdit_dataset"):  # the report says what it warns of
        report = check_folder(args)
        names = names_of(lambda: open_pictures(args.image_folder))
    for line in report.lines():
        say(line)
    if args.sheet_samples and names:
        write_contact_sheet(args.sheet_path, sheet_rows(Layout(args.image_folder), names, args.sheet_samples))
        say(f"contact sheet: {args.sheet_path}")
    if args.json is not None:
        write_json(args.json, report.figures())
    sys.exit(0 if report.would_run else 1)


if __name__ == "__main__":
    run_main(main)
