"""Preprocessing step 2: cache the latents and text features of a prepared image folder.

    python dataset/preprocess_step2.py --image_folder FOLDER --clip_l ... --t5xxl ... --ae ...

Without weight flags the embedded model's encoders are used. The step can be interrupted and run again: finished samples
(with --shard_size: finished shards) are kept, and a cache made by other models or settings is refused. Several
processes (accelerate launch) share the work; the files are the same however many there are.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dataset.cache import claim_folder
from dataset.encode_folder import FolderEncoder
from dataset.jointdit_dataset import PicturePairs
from dataset.preprocess_args import EncodingArgs, PairsArgs
from dataset.prompt_features import load_prompt_encoder
from library.args import parse
from library.cli import run_main, say, set_threads
from library.encoding import LatentEncoder, PromptEncoder
from library.fingerprint import fingerprint
from library.flux.weights import load_autoencoder
from library.weight_paths import frozen_paths


def load_encoder(args: EncodingArgs, paths: Mapping[str, Path]) -> PromptEncoder:
    """Load the text encoders to the device of the flags."""
    device = args.torch_device()
    dtype = args.torch_dtype(device)
    return load_prompt_encoder(args, paths, device=device, dtype=dtype, with_mask=args.is_attnmask_training)


def text_made_by(args: EncodingArgs, encoder: PromptEncoder, paths: dict[str, Path]) -> dict[str, Any]:
    """What decides text features, as it is written beside them."""
    return {
        "clip_l": fingerprint(paths["clip_l"]),
        "t5xxl": fingerprint(paths["t5xxl"]),
        "clip_activation": args.clip_activation,
        "t5_length": encoder.encoders.t5_length,
        "text_mask": encoder.with_mask,
    }


def main() -> None:
    """Read the flags and fill the cache."""
    args = parse(sys.argv[1:], PairsArgs, description="Cache latents and text features of a prepared image folder")
    set_threads(args.num_threads)
    pairs = PicturePairs(args.image_folder, depth_transform=args.depth_transform, max_bad_samples=args.max_bad_samples)
    paths = frozen_paths(args, *(("clip_l", "t5xxl") if args.text else ()), "ae")
    # The autoencoder stays in float32: half precision costs depth accuracy, and it is small.
    autoencoder = load_autoencoder(paths["ae"], dtype=torch.float32, device=args.torch_device())
    prompts = load_encoder(args, paths) if args.text else None
    made_by = {
        "ae": fingerprint(paths["ae"]),
        "depth_transform": args.depth_transform,
        "posterior": args.posterior,
        "seed": args.seed,
        "precision": args.save_precision,
        "text": args.text,
    }
    if prompts is not None:
        made_by |= text_made_by(args, prompts, paths)
    stamp = claim_folder(pairs.layout.cache_meta, made_by, flag="--image_folder")
    encoder = FolderEncoder(
        pairs=pairs,
        latents=LatentEncoder(autoencoder=autoencoder, posterior=args.posterior, seed=args.seed),
        prompts=prompts,
        batch_size=args.batch_size,
        dtype=args.dtype,
        stamp=stamp,
        max_bad_samples=args.max_bad_samples,
    )
    made = encoder.run(shard_size=args.shard_size)
    say(f"{made} of {len(pairs.names)} pairs cached by this process in {pairs.layout.cache}")


if __name__ == "__main__":
    run_main(main)
