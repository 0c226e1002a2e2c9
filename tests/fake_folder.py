"""Small prepared folders for tests: pictures with depth maps and prompts, or a cache of random latents."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dataset.cache import FORMAT, CachedPair, stamp_of, write_pair
from dataset.layout import Layout
from dataset.prompt_features import write_prompt_features
from library.batches import PromptFeatures
from library.files import save_tensors, write_json
from library.fingerprint import fingerprint
from library.flux.autoencoder import Autoencoder
from library.flux.model import Flux
from library.flux.text import TextFeatures
from library.flux.variants import AutoencoderConfig, FluxConfig
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
    folder: Path,
    *,
    names: tuple[str, ...] = NAMES,
    side: int = 4,
    length: int = 5,
    width: int = 48,
    pooled: int = 32,
    autoencoder: Path | None = None,
    **made_with: Any,
) -> Layout:
    """Write a cache of random latents (16, side, side) and text features, as if made with `autoencoder` and so on."""
    layout = Layout(folder)
    layout.cache.mkdir(parents=True, exist_ok=True)
    made_by = {
        "format": FORMAT,
        "depth_transform": "none",
        "clip_l": "c",
        "clip_activation": "gelu",
        "t5xxl": "t",
        "t5_length": length,
        "text": True,
        "text_mask": False,
        "ae": fingerprint(autoencoder) if autoencoder else "a",
        **made_with,
    }
    for number, name in enumerate(names):
        generator = torch.Generator().manual_seed(number)
        pair = CachedPair(
            rgb_Chw=torch.randn(16, side, side, generator=generator),
            depth_Chw=torch.randn(16, side, side, generator=generator),
            text=random_text(1, length=length, width=width, pooled=pooled, seed=number),
        )
        write_pair(layout.cached(name), pair, dtype=torch.float32, stamp=stamp_of(made_by))
    write_json(layout.cache_meta, made_by)
    return layout


def write_prompts(folder: Path, *, length: int = 5, width: int = 48, pooled: int = 32, t5xxl: str = "t") -> None:
    """Write random features of the empty and of two evaluation prompts, as if made by the encoders of `write_cache`."""
    sizes = {"length": length, "width": width, "pooled": pooled}
    features = PromptFeatures(
        empty=random_text(1, seed=100, **sizes),
        prompts=("one", "two"),
        evaluation=random_text(2, seed=101, **sizes),
    )
    made_by = {"clip_l": "c", "clip_activation": "gelu", "t5xxl": t5xxl, "t5_length": length, "text_mask": False}
    write_prompt_features(folder, features, made_by=made_by, dtype=torch.float32)


def write_base(path: Path) -> None:
    """Write a tiny random backbone that fits `write_cache`."""
    config = FluxConfig(
        vec_in_dim=32,
        context_in_dim=48,
        hidden_size=32,
        num_heads=2,
        depth=1,
        depth_single_blocks=2,
        axes_dim=(4, 6, 6),
    )
    torch.manual_seed(0)
    save_tensors(path, Flux(config).state_dict())
    write_json(path.with_suffix(".json"), asdict(config))


def write_autoencoder(path: Path) -> None:
    """Write a tiny random autoencoder with the latents of `write_cache`."""
    config = AutoencoderConfig(resolution=32, ch=8, num_res_blocks=1, num_groups=1)
    torch.manual_seed(0)
    save_tensors(path, Autoencoder(config).state_dict())
    write_json(path.with_suffix(".json"), asdict(config))
