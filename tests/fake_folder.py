"""Small prepared folders for tests: pictures with depth maps and prompts, or a cache of random latents."""

from pathlib import Path

import numpy as np
import torch

from dataset.cache import FORMAT, CachedPair, write_pair
from dataset.layout import Layout
from library.files import write_json
from library.flux.text import TextFeatures
from library.images import write_rgb

NAMES = tuple(f"{index:08d}" for index in range(8))


def write_pictures(folder: Path, *, names: tuple[str, ...] = NAMES, size: int = 32) -> Layout:
    """Write pictures, depth maps and prompts."""
    layout = Layout(folder)
    generator = torch.Generator().manual_seed(0)
    for path in (layout.depthmaps, layout.text_prompts):
        path.mkdir(parents=True, exist_ok=True)
    for name in names:
        write_rgb(layout.image(name), torch.rand(3, size, size, generator=generator))
        np.save(layout.depthmap(name), torch.rand(size, size, generator=generator).numpy())
        layout.prompt(name).write_text(f"picture {name}\n", encoding="utf-8")
    return layout


def random_text(batch: int, *, length: int, width: int, pooled: int, seed: int) -> TextFeatures:
    """Random features."""
    generator = torch.Generator().manual_seed(seed)
    return TextFeatures(
        tokens_BLD=torch.randn(batch, length, width, generator=generator),
        pooled_BD=torch.randn(batch, pooled, generator=generator),
    )


def write_cache(
    folder: Path, *, names: tuple[str, ...] = NAMES, side: int = 4, length: int = 5, width: int = 48, pooled: int = 32
) -> Layout:
    """Write a cache of random latents (16, side, side) and text features."""
    layout = Layout(folder)
    layout.cache.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        generator = torch.Generator().manual_seed(number)
        pair = CachedPair(
            rgb_Chw=torch.randn(16, side, side, generator=generator),
            depth_Chw=torch.randn(16, side, side, generator=generator),
            text=random_text(1, length=length, width=width, pooled=pooled, seed=number),
        )
        write_pair(layout.cached(name), pair, dtype=torch.float32)
    made_by = {"format": FORMAT, "depth_transform": "none", "clip_l": "c", "t5xxl": "t", "t5_length": length}
    write_json(layout.cache_meta, {**made_by, "text_mask": False, "ae": "a"})
    return layout
