"""Preprocessing step 2: cache the latents and text features of a prepared image folder.

    python dataset/preprocess_step2.py --image_folder FOLDER --clip_l ... --t5xxl ... --ae ...

Without weight flags the embedded model's encoders are used. The step can be interrupted and run again: finished samples
are kept, and a cache made by other models or settings is refused. Several processes (accelerate launch) share the work.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from dataset.cache import CachedPair, claim_folder, fingerprint, write_pair
from dataset.jointdit_dataset import PicturePairs
from dataset.layout import Layout
from dataset.preprocess_args import EncodingArgs, PairsArgs
from library.args import parse
from library.batches import text_rows
from library.cli import is_main_process, process_count, process_rank, run_main, say, set_threads
from library.encoding import LatentEncoder, PairEncoder, PromptEncoder
from library.flux.text import load_text_encoders
from library.flux.weights import load_autoencoder
from library.weight_paths import frozen_paths


def load_prompt_encoder(args: EncodingArgs, paths: dict[str, Path]) -> PromptEncoder:
    """Load the text encoders."""
    device = args.torch_device()
    encoders = load_text_encoders(
        paths["clip_l"],
        paths["t5xxl"],
        clip_tokenizer=args.clip_tokenizer,
        t5_tokenizer=args.t5_tokenizer,
        t5_length=args.t5xxl_max_token_length,
        clip_activation=args.clip_activation,
        dtype=args.torch_dtype(device),
        device=device,
    )
    return PromptEncoder(encoders=encoders, with_mask=args.is_attnmask_training)


def text_made_by(args: EncodingArgs, encoder: PromptEncoder, paths: dict[str, Path]) -> dict[str, Any]:
    """What decides text features, as it is written beside them."""
    return {
        "clip_l": fingerprint(paths["clip_l"]),
        "t5xxl": fingerprint(paths["t5xxl"]),
        "clip_activation": args.clip_activation,
        "t5_length": encoder.encoders.t5_length,
        "text_mask": encoder.with_mask,
    }


def encode_folder(pairs: PicturePairs, encoder: PairEncoder, args: PairsArgs) -> int:
    """Cache every sample that isn't cached yet; return how many were made by this process."""
    layout = pairs.layout
    mine = range(process_rank(), len(pairs.names), process_count())
    todo = [index for index in mine if not layout.cached(pairs.names[index]).exists()]
    with tqdm(
        total=len(mine), initial=len(mine) - len(todo), unit="pair", disable=not is_main_process(), dynamic_ncols=True
    ) as bar:
        for chunk in _chunks(todo, args.batch_size):
            samples = [pairs.read(index) for index in chunk]
            text = encoder.prompts.encode([prompt for *_, prompt in samples])
            for row, (name, rgb_3hw, depth_3hw, _) in enumerate(samples):
                pair = CachedPair(
                    rgb_Chw=encoder.latents.encode(rgb_3hw[None], names=[name], modality="rgb")[0],
                    depth_Chw=encoder.latents.encode(depth_3hw[None], names=[name], modality="depth")[0],
                    text=text_rows(text, slice(row, row + 1)),
                )
                write_pair(layout.cached(name), pair, dtype=args.dtype)
            bar.update(len(chunk))
    return len(todo)


def _chunks(items: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def main() -> None:
    """Read the flags and fill the cache."""
    args = parse(sys.argv[1:], PairsArgs, description="Cache latents and text features of a prepared image folder")
    set_threads(args.num_threads)
    pairs = PicturePairs(args.image_folder, depth_transform=args.depth_transform)
    paths = frozen_paths(args, "clip_l", "t5xxl", "ae")
    # The autoencoder stays in float32: half precision costs depth accuracy, and it is small.
    autoencoder = load_autoencoder(paths["ae"], dtype=torch.float32, device=args.torch_device())
    latents = LatentEncoder(autoencoder=autoencoder, posterior=args.posterior, seed=args.seed)
    encoder = PairEncoder(latents=latents, prompts=load_prompt_encoder(args, paths))
    made_by = text_made_by(args, encoder.prompts, paths) | {
        "ae": fingerprint(paths["ae"]),
        "depth_transform": args.depth_transform,
        "posterior": args.posterior,
        "seed": args.seed,
        "precision": args.save_precision,
    }
    claim_folder(Layout(args.image_folder).cache_meta, made_by, flag="--image_folder")
    made = encode_folder(pairs, encoder, args)
    say(f"{made} of {len(pairs.names)} pairs cached in {pairs.layout.cache}")


if __name__ == "__main__":
    run_main(main)
