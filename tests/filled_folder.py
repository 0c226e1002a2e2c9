"""Step 2 on small folders: a tiny random autoencoder, and text features that depend on the prompt only."""

from pathlib import Path

import torch
from fake_folder import random_text, write_autoencoder

from dataset.cache import claim_folder
from dataset.encode_folder import FolderEncoder
from dataset.jointdit_dataset import PicturePairs
from library.encoding import LatentEncoder, PairEncoder, PromptEncoder
from library.flux.text import TextFeatures
from library.flux.weights import load_autoencoder

META = {"ae": "a", "depth_transform": "none"}


class FakeTextEncoders:
    """Features that depend on the prompt only, in place of gigabytes of encoders."""

    t5_length = 5

    def encode(self, prompts, *, with_mask, with_ids) -> TextFeatures:
        texts = [random_text(1, length=5, width=48, pooled=32, seed=sum(prompt.encode())) for prompt in prompts]
        return TextFeatures(
            tokens_BLD=torch.cat([text.tokens_BLD for text in texts]),
            pooled_BD=torch.cat([text.pooled_BD for text in texts]),
        )


def make_encoder(folder: Path) -> PairEncoder:
    """A tiny random autoencoder whose posterior is sampled, and such text encoders."""
    path = folder / "ae.safetensors"
    write_autoencoder(path)
    latents = LatentEncoder(autoencoder=load_autoencoder(path), posterior="sample", seed=3)
    return PairEncoder(latents=latents, prompts=PromptEncoder(encoders=FakeTextEncoders()))


def fill(folder, encoder, *, shard_size=None, text=True, dtype=torch.float32, **settings) -> int:
    """Run step 2 on a folder with given encoders; return how many samples were made."""
    pictures = PicturePairs(folder, depth_transform="none", max_bad_samples=settings.get("max_bad_samples", 0))
    stamp = claim_folder(pictures.layout.cache_meta, META | {"text": text}, flag="--image_folder")
    return FolderEncoder(
        pairs=pictures,
        latents=encoder.latents,
        prompts=encoder.prompts if text else None,
        batch_size=3,
        dtype=dtype,
        stamp=stamp,
        **settings,
    ).run(shard_size=shard_size)


def cache_files(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "cache").iterdir())}
