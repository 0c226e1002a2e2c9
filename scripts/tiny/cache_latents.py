"""Encode a prepared scene folder once, for the embedded backbone's training.

    python scripts/tiny/cache_latents.py --scenes FOLDER --ae FOLDER/ae.safetensors --output FILE

writes one safetensors file with "rgb" and "depth", each (N, 16, h / 8, w / 8) in fp16, scaled as the transformer reads
them, and "objects", uint8 (N, h / 4, w / 4), which solids are seen where (object_cells.py). Row n belongs to the n-th
name in order; the names are in the header (`read_names`).
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from object_cells import read_object_cells
from pictures import load_pictures, sample_names
from safetensors import safe_open

from library.cli import run_main, say, set_threads
from library.files import save_tensors
from library.flags import Flags, flag, parse
from library.flux.weights import load_autoencoder

BATCH = 32


@dataclass(frozen=True, kw_only=True)
class LatentCacheArgs(Flags):
    """Flags of the latent cache."""

    scenes: Path = flag(help="prepared scene folder (dataset/make_scenes.py)")
    ae: Path = flag(help="autoencoder, with ae.json beside it")
    output: Path = flag(help="safetensors file to write")
    limit: int | None = flag(None, help="encode the first so many scenes only", minimum=1)
    num_threads: int = flag(0, help="CPU threads; 0 takes all this process may use", minimum=0)


def read_names(path: Path) -> list[str]:
    """Return the names of a latent file's rows."""
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["jointdit"])["names"]


@torch.inference_mode()
def cache_latents(scenes: Path, *, ae: Path, output: Path, limit: int | None = None) -> None:
    """Encode the scenes in batches, the posterior's mean, and write `output`."""
    names = sample_names(scenes, flag="--scenes")[:limit]
    autoencoder = load_autoencoder(ae).to(memory_format=torch.channels_last)
    parts: dict[str, list[torch.Tensor]] = {"rgb": [], "depth": [], "objects": []}
    for start in range(0, len(names), BATCH):
        part = names[start : start + BATCH]
        pictures = load_pictures(scenes, part, flag="--scenes")
        parts["objects"].append(read_object_cells(scenes, part))
        for kind, pixels in (("rgb", pictures.rgb()), ("depth", pictures.depth())):
            parts[kind].append(autoencoder.encode(pixels.contiguous(memory_format=torch.channels_last)).half())
        if start // BATCH % 100 == 0:
            say(f"{start + len(pictures)} of {len(names)}")
    latents = {kind: torch.cat(each) for kind, each in parts.items()}
    save_tensors(output, latents, {"names": names})
    for kind in ("rgb", "depth"):
        values = latents[kind]
        channels = ", ".join(f"{deviation:.2f}" for deviation in values.float().std(dim=(0, 2, 3)))
        say(f"{kind}: mean {values.float().mean():.3f}, std {values.float().std():.3f}, by channel {channels}")


def main() -> None:
    """Read the flags and encode."""
    args = parse(sys.argv[1:], LatentCacheArgs, description=__doc__)
    set_threads(args.num_threads)
    cache_latents(args.scenes, ae=args.ae, output=args.output, limit=args.limit)


if __name__ == "__main__":
    run_main(main)
