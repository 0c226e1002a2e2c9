"""Transformer and autoencoder from original single files or diffusers folders.

Sizes are read off the tensors; what shapes can't tell (rotary widths, scale and shift of the latents, number of groups)
comes from the JSON files beside them, the header, and at last the variant table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from library.flux.autoencoder import Autoencoder
from library.flux.checkpoint import Checkpoint, Source, fill, open_checkpoint, parts_of
from library.flux.diffusers_names import autoencoder_config, autoencoder_sources, flux_config, flux_sources
from library.flux.model import Flux
from library.flux.variants import VARIANTS, AutoencoderConfig, FluxConfig, Variant

FLUX_FLAG = "--pretrained_model_name_or_path"
AUTOENCODER_FLAG = "--ae"
_PREFIX = "model.diffusion_model."  # some published single files carry it


def load_flux(path: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Flux:
    """Load a FLUX.1 transformer, in eval mode and without gradients.

    Args:
        path: `flux1-dev.safetensors` or another original single file, or a diffusers folder (`transformer` or the one
            above it).
        dtype: of the weights.
        device: of the weights.

    Raises:
        UserError: naming the flag, the file and the first names, if a tensor is missing, unknown or of a wrong size.
    """
    checkpoint, sources = open_flux(path)
    config = read_flux_config(checkpoint, sources)
    return fill(lambda: Flux(config), checkpoint, sources, dtype=dtype, device=device)


def open_flux(path: str | Path) -> tuple[Checkpoint, Mapping[str, Source]]:
    """Find a transformer's tensors, whatever its format: the checkpoint, and what each of our tensors is made of."""
    path = _inner_folder(Path(path), "transformer")
    checkpoint = open_checkpoint(
        path, flag=FLUX_FLAG, model_types=("flux", "FluxTransformer2DModel"), translate=flux_config
    )
    if "x_embedder.weight" in checkpoint.shapes:
        return checkpoint, flux_sources(checkpoint)
    return checkpoint, {name.removeprefix(_PREFIX): name for name in checkpoint.shapes}


def read_flux_config(checkpoint: Checkpoint, sources: Mapping[str, Source]) -> FluxConfig:
    """Read a transformer's sizes off its tensors.

    Raises:
        UserError: a needed tensor is missing, or a JSON file contradicts the tensors.
    """

    def shape(name: str) -> Sequence[int]:
        source = sources.get(name, name)
        return checkpoint.shape(parts_of(source)[0])

    hidden, channels = shape("img_in.weight")
    head_width = shape("double_blocks.0.img_attn.norm.query_norm.scale")[0]
    sizes: dict[str, Any] = {
        "in_channels": channels,
        "hidden_size": hidden,
        "vec_in_dim": shape("vector_in.in_layer.weight")[1],
        "context_in_dim": shape("txt_in.weight")[1],
        "mlp_ratio": shape("double_blocks.0.img_mlp.0.weight")[0] / hidden,
        "num_heads": hidden // head_width,
        "depth": _blocks(sources, "double_blocks"),
        "depth_single_blocks": _blocks(sources, "single_blocks"),
        "qkv_bias": "double_blocks.0.img_attn.qkv.bias" in sources,
        "guidance_embed": "guidance_in.in_layer.weight" in sources,
    }
    try:
        return FluxConfig(**checkpoint.checked(sizes), **_rotary(checkpoint, head_width=head_width))
    except ValueError as error:
        raise checkpoint.fail(f"{error}; mend the JSON") from error


def _rotary(checkpoint: Checkpoint, *, head_width: int) -> dict[str, Any]:
    """Rotary widths and base: from the configuration, else of the first known variant with such heads."""
    known = next((row.flux for row in VARIANTS.values() if row.flux.head_width == head_width), None)
    axes_dim = checkpoint.config.get("axes_dim", known.axes_dim if known else None)
    if axes_dim is None or sum(axes_dim) != head_width:
        beside = checkpoint.path.with_suffix(".json").name
        raise checkpoint.fail(f"heads of width {head_width} need axes_dim of that sum; say them in {beside}")
    theta = checkpoint.config.get("theta", (known or FluxConfig()).theta)
    return {"axes_dim": tuple(axes_dim), "theta": theta}


def variant_of(config: FluxConfig, *, path: str | Path = "") -> Variant:
    """Find the variant of these sizes: how it likes to be sampled. Krea-dev has dev's: told by its file's name."""
    rows = [row for row in VARIANTS.values() if row.flux == config]
    named = [row for row in rows if row.name.removesuffix("-dev") in Path(path).name.lower()]
    if rows:
        return max(named, key=lambda row: len(row.name), default=rows[0])
    return VARIANTS["dev"] if config.guidance_embed else VARIANTS["tiny"]


def load_autoencoder(
    path: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Autoencoder:
    """Load a FLUX.1 autoencoder, in eval mode and without gradients.

    Args:
        path: `ae.safetensors`, or a diffusers folder (the `vae` folder or the one above it).
        dtype: of the weights.
        device: of the weights.

    Raises:
        UserError: naming the flag, the file and the first names, if a tensor is missing, unknown or of a wrong size.
    """
    checkpoint, sources = open_autoencoder(path)
    config = read_autoencoder_config(checkpoint, sources)
    return fill(lambda: Autoencoder(config), checkpoint, sources, dtype=dtype, device=device)


def open_autoencoder(path: str | Path) -> tuple[Checkpoint, Mapping[str, Source]]:
    """Find an autoencoder's tensors, whatever its format: the checkpoint, and what each of our tensors is made of."""
    path = _inner_folder(Path(path), "vae")
    checkpoint = open_checkpoint(
        path, flag=AUTOENCODER_FLAG, model_types=("flux-ae", "AutoencoderKL"), translate=autoencoder_config
    )
    if "decoder.mid_block.attentions.0.to_q.weight" in checkpoint.shapes:
        return checkpoint, autoencoder_sources(checkpoint)
    return checkpoint, {name: name for name in checkpoint.shapes}


def read_autoencoder_config(checkpoint: Checkpoint, sources: Mapping[str, Source]) -> AutoencoderConfig:
    """Read an autoencoder's sizes off its tensors; scale, shift and groups from its configuration."""

    def shape(name: str) -> Sequence[int]:
        source = sources.get(name, name)
        return checkpoint.shape(parts_of(source)[0])

    ch, in_channels = shape("encoder.conv_in.weight")[:2]
    levels = _blocks(sources, "encoder.down")
    blocks = _blocks(sources, "encoder.down.0.block")
    widths = [shape(f"encoder.down.{level}.block.0.conv2.weight")[0] for level in range(levels)]
    sizes: dict[str, Any] = {
        "ch": ch,
        "in_channels": in_channels,
        "out_ch": shape("decoder.conv_out.weight")[0],
        "ch_mult": tuple(width // ch for width in widths),
        "num_res_blocks": blocks,
        "z_channels": shape("decoder.conv_in.weight")[1],
    }
    told = checkpoint.config
    rest = {name: told[name] for name in ("scale_factor", "shift_factor", "num_groups", "resolution") if name in told}
    groups = rest.get("num_groups", AutoencoderConfig().num_groups)
    if any(width % groups for width in (ch, *widths)):
        beside = checkpoint.path.with_suffix(".json").name
        raise checkpoint.fail(f"{groups} groups don't divide its widths; say num_groups in {beside}")
    return AutoencoderConfig(**checkpoint.checked(sizes), **rest)


def _blocks(names: Mapping[str, Any], prefix: str) -> int:
    """Number of numbered parts under `prefix`."""
    start = prefix + "."
    return len({name.removeprefix(start).split(".")[0] for name in names if name.startswith(start)})


def _inner_folder(path: Path, name: str) -> Path:
    """Step into the folder that diffusers keeps this part in."""
    return path / name if (path / name).is_dir() else path
