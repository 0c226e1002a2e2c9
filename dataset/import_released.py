"""Convert a cache of the released code (`.pt` files) into this project's.

    python -m dataset.import_released --cache FOLDER --output FOLDER --ae ... --clip_l ... --t5xxl ...

Nothing in the files is run: they are pickles, and only plain tensors are taken out of them. The weight flags say which
models made the cache, since its files don't; without them that stays unknown, and train.py wants --trust_cache. Samples
that were converted already are kept, so a broken run goes on where it stopped.
"""

import logging
import sys
from dataclasses import dataclass
from functools import partial, reduce
from heapq import nsmallest
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from dataset.cache import TEXT_KEYS, UNKNOWN, CachedPair, claim_folder, write_pair
from dataset.layout import EMPTY_PROMPTS, EVALUATION_PROMPTS, Layout
from dataset.prompt_features import read_prompts, write_prompt_features
from dataset.released_cache import (
    DEPTH_LATENTS,
    IMAGE_LATENTS,
    T5_LATENTS,
    Refused,
    list_released,
    read_latent,
    read_text,
    read_transform,
)
from dataset.workers import map_in_workers
from library.args import AutoencoderArgs, TextEncoderArgs, flag, parse
from library.batches import PromptFeatures, concatenate_text
from library.cli import is_main_process, run_main, say
from library.errors import UserError
from library.fingerprint import fingerprint
from library.flux.text import TextFeatures
from library.modality import DEPTH_TRANSFORMS
from library.training_args import PRECISIONS
from library.weight_paths import find_weights

log = logging.getLogger(__name__)

_AT_ONCE = 16  # samples of one task
_TRIED = 100  # samples of which one must be whole
_NAMED = 20  # refused files that are named one by one


@dataclass(frozen=True, kw_only=True)
class ImportArgs(TextEncoderArgs, AutoencoderArgs):
    """Flags of this command."""

    cache: Path = flag(help="folder of the released code's image_latents, depth_latents, ...", metavar="FOLDER")
    output: Path = flag(help="prepared image folder whose cache is filled; may be the same", metavar="FOLDER")
    prompts: Path | None = flag(
        None, help="folder of the released code's empty_prompts and evaluation_prompts; they go to --output too",
        metavar="FOLDER",
    )  # fmt: skip
    depth_transform: str | None = flag(
        None, help="what the cache's depth was made with, where it doesn't say itself", choices=DEPTH_TRANSFORMS
    )
    is_attnmask_training: bool = flag(False, help="the T5 features were made with their padding masked: keep the masks")
    save_precision: str | None = flag(
        None, help="precision of the converted floats (otherwise each sample's own)", choices=tuple(PRECISIONS)
    )
    workers: int = flag(1, help="processes that convert", minimum=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, needed in (("cache", IMAGE_LATENTS), ("prompts", EMPTY_PROMPTS)):
            folder = getattr(self, name)
            if folder is not None and not (folder / needed).is_dir():
                raise UserError(f"--{name} {folder}: has no folder {needed}; name the folder that holds it")
        for name in ("clip_tokenizer", "t5_tokenizer"):
            if getattr(self, name) is not None:
                raise UserError(f"--{name} {getattr(self, name)}: no text is encoded here; leave it away")


class TextShape(NamedTuple):
    """What the text features of all samples have in common."""

    tokens: int
    width: int
    pooled: int
    numbered: bool

    @classmethod
    def of(cls, text: TextFeatures) -> "TextShape":
        """Measure one sample's features."""
        _, tokens, width = text.tokens_BLD.shape
        return cls(tokens, width, text.pooled_BD.shape[1], text.ids_BL3 is not None)


class Converted(NamedTuple):
    """What became of some samples."""

    seen: int
    made: int
    refused: list[str]


def describe_origin(args: ImportArgs, shape: TextShape) -> dict[str, Any]:
    """Say what is known of what made the cache, in the words of preprocessing step 2."""
    models = {name: getattr(args, name) for name in ("clip_l", "t5xxl", "ae")}
    if args.t5xxl_max_token_length not in (None, shape.tokens):
        raise UserError(
            f"--t5xxl_max_token_length {args.t5xxl_max_token_length}: the cache has {shape.tokens}; leave it away"
        )
    return {
        **{name: fingerprint(find_weights(name, path)) if path else UNKNOWN for name, path in models.items()},
        "clip_activation": args.clip_activation,
        "t5_length": shape.tokens,
        "text_mask": args.is_attnmask_training,
        "depth_transform": read_transform(args.cache, given=args.depth_transform),
        "precision": args.save_precision or "as imported",
        "text": True,
    }


def read_released_pair(folder: Path, name: str, *, with_mask: bool, shape: TextShape | None = None) -> CachedPair:
    """Read all files of a sample, whose text features must have the given shape.

    Raises:
        Refused: naming the file.
    """
    rgb_Chw = read_latent(folder / IMAGE_LATENTS / f"{name}.pt")
    path = folder / DEPTH_LATENTS / f"{name}.pt"
    depth_Chw = read_latent(path)
    if rgb_Chw.shape != depth_Chw.shape:
        raise Refused(f"{path}: has the shape {tuple(depth_Chw.shape)}, the image latent {tuple(rgb_Chw.shape)}")
    text = read_text(folder, name, with_mask=with_mask)
    if shape not in (None, TextShape.of(text)):
        raise Refused(f"{folder / T5_LATENTS / name}.pt: {TextShape.of(text)}, but the first sample has {shape}")
    return CachedPair(rgb_Chw=rgb_Chw, depth_Chw=depth_Chw, text=text)


def convert(names: list[str], *, args: ImportArgs, stamp: str, shape: TextShape) -> Converted:
    """Convert some samples; what is there already is kept, and files that can't be taken are named."""
    made, refused = 0, []
    for name in names:
        target = Layout(args.output).cached(name)
        if target.exists():
            continue
        try:
            pair = read_released_pair(args.cache, name, with_mask=args.is_attnmask_training, shape=shape)
        except Refused as error:
            refused.append(str(error))
            continue
        assert pair.text is not None
        dtype = _precision(args, pair.rgb_Chw, pair.depth_Chw, pair.text.tokens_BLD, pair.text.pooled_BD)
        write_pair(target, pair, dtype=dtype, stamp=stamp)
        made += 1
    return Converted(len(names), made, refused)


def _precision(args: ImportArgs, *floats: Tensor) -> torch.dtype:
    """Type to keep a file's floats in: the flag's, or one in which none of them loses anything."""
    if args.save_precision is not None:
        return PRECISIONS[args.save_precision]
    return reduce(torch.promote_types, (tensor.dtype for tensor in floats))


def find_shape(args: ImportArgs) -> tuple[int, TextShape]:
    """Count the samples, and take the shape of the text features from the first by name that can be read.

    Raises:
        UserError: none of the first ones can be read.
    """
    count = sum(1 for _ in list_released(args.cache))
    reason = "there is none"
    for name in nsmallest(_TRIED, list_released(args.cache)):
        try:
            pair = read_released_pair(args.cache, name, with_mask=args.is_attnmask_training)
        except Refused as error:
            reason = str(error)
            continue
        assert pair.text is not None
        return count, TextShape.of(pair.text)
    raise UserError(f"--cache {args.cache}: no sample in {IMAGE_LATENTS} can be taken; {reason}")


def import_samples(args: ImportArgs) -> list[str]:
    """Convert what isn't converted yet; return what was refused."""
    count, shape = find_shape(args)
    stamp = claim_folder(Layout(args.output).cache_meta, describe_origin(args, shape), flag="--output")
    names = list_released(args.cache)
    tasks = iter(lambda: list(islice(names, _AT_ONCE)), [])
    work = partial(convert, args=args, stamp=stamp, shape=shape)
    made, refused = 0, []
    with tqdm(total=count, unit="sample", dynamic_ncols=True) as bar:
        for part in map_in_workers(work, tasks, workers=args.workers):
            made += part.made
            refused += part.refused
            bar.update(part.seen)
    kept = count - made - len(refused)
    say(f"{made} of {count} samples converted into {Layout(args.output).cache}, {kept} were there")
    if shape.numbered:
        say("their text positions are numbered: train with --is_txt_ids_training")
    return refused


def import_prompts(args: ImportArgs, folder: Path) -> None:
    """Convert the features of the empty and of the evaluation prompts.

    Raises:
        UserError: a file can't be taken, or there are not as many as the list of prompts has lines.
    """
    listed = folder / EVALUATION_PROMPTS
    lists = sorted(listed.glob("*.txt"))
    if len(lists) != 1:
        raise UserError(f"--prompts {listed}: has {len(lists)} lists of prompts (.txt), must have the one")
    prompts = read_prompts(lists[0], flag="--prompts")
    try:
        empty = read_text(folder / EMPTY_PROMPTS, "empty", with_mask=args.is_attnmask_training)
        rows = [
            read_text(listed, f"{number:05d}", with_mask=args.is_attnmask_training)
            for number in range(1, len(prompts) + 1)
        ]
    except Refused as error:
        raise UserError(f"--prompts {error}") from None
    features = PromptFeatures(empty=empty, prompts=prompts, evaluation=concatenate_text(rows) if rows else None)
    origin = {key: value for key, value in describe_origin(args, TextShape.of(empty)).items() if key in TEXT_KEYS}
    dtype = _precision(args, empty.tokens_BLD, empty.pooled_BD)
    write_prompt_features(args.output, features, made_by=origin, dtype=dtype)
    say(f"features of the empty and {len(prompts)} prompts: train with --prompt_folder {args.output}")


def main() -> None:
    """Read the flags, convert, and name what was refused; exit status 1 if anything was."""
    args = parse(sys.argv[1:], ImportArgs, description="Convert a cache of the released code into this project's")
    if not is_main_process():
        return  # --workers shares the work
    torch.set_num_threads(1)
    refused = import_samples(args)
    if args.prompts is not None:
        import_prompts(args, args.prompts)
    if any(getattr(args, name) is None for name in ("clip_l", "t5xxl", "ae")):
        say("which models made it all isn't known: train with --trust_cache, or import with --clip_l, --t5xxl and --ae")
    for text in refused[:_NAMED]:
        log.error("refused: %s", text)
    if refused:
        log.error("%d samples were refused; mend or delete them and run the command again", len(refused))
        sys.exit(1)


if __name__ == "__main__":
    run_main(main)
