"""diffusers' names for FLUX.1's transformer and autoencoder, told in the original ones.

diffusers keeps q, k and v apart, swaps scale and shift of the last modulation, and attends in the autoencoder by
linear layers instead of 1 x 1 convolutions.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from library.flux.checkpoint import Checkpoint, Merged, Source, parts_of

_KINDS = ("weight", "bias")
_CONFIG_NAMES = {
    "in_channels": "in_channels",
    "pooled_projection_dim": "vec_in_dim",
    "joint_attention_dim": "context_in_dim",
    "num_attention_heads": "num_heads",
    "num_layers": "depth",
    "num_single_layers": "depth_single_blocks",
    "axes_dims_rope": "axes_dim",
    "guidance_embeds": "guidance_embed",
}
_AUTOENCODER_CONFIG_NAMES = {
    "scaling_factor": "scale_factor",
    "shift_factor": "shift_factor",
    "norm_num_groups": "num_groups",
    "latent_channels": "z_channels",
}

_OUTER = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "proj_out": "final_layer.linear",
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
}
_DOUBLE = {
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
}
_DOUBLE_SCALES = {
    "attn.norm_q": "img_attn.norm.query_norm",
    "attn.norm_k": "img_attn.norm.key_norm",
    "attn.norm_added_q": "txt_attn.norm.query_norm",
    "attn.norm_added_k": "txt_attn.norm.key_norm",
}
_DOUBLE_FUSED: dict[str, tuple[str, ...]] = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}
_SINGLE = {"norm.linear": "modulation.lin", "proj_out": "linear2"}
_SINGLE_SCALES = {"attn.norm_q": "norm.query_norm", "attn.norm_k": "norm.key_norm"}
_SINGLE_FUSED: dict[str, tuple[str, ...]] = {"linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")}


def flux_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Translate the sizes of a diffusers `config.json` to ours; settings that are ours already stay."""
    if "_class_name" not in config:
        return dict(config)
    sizes = {ours: config[theirs] for theirs, ours in _CONFIG_NAMES.items() if theirs in config}
    if "num_attention_heads" in config and "attention_head_dim" in config:
        sizes["hidden_size"] = config["num_attention_heads"] * config["attention_head_dim"]
    return sizes


def autoencoder_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Translate what shapes can't tell of a diffusers `config.json` to ours; settings that are ours already stay."""
    if "_class_name" not in config:
        return dict(config)
    return {ours: config[theirs] for theirs, ours in _AUTOENCODER_CONFIG_NAMES.items() if theirs in config}


def flux_sources(checkpoint: Checkpoint) -> dict[str, Source]:
    """What each of the transformer's tensors is made of; unknown names are kept, so that a strict load refuses them."""
    sources = _layer_sources(_OUTER)
    for kind in _KINDS:
        swapped = Merged(parts=(f"norm_out.linear.{kind}",), merge=_swap_halves)
        sources[f"final_layer.adaLN_modulation.1.{kind}"] = swapped
    tables = (
        ("double_blocks", "transformer_blocks", _DOUBLE, _DOUBLE_SCALES, _DOUBLE_FUSED),
        ("single_blocks", "single_transformer_blocks", _SINGLE, _SINGLE_SCALES, _SINGLE_FUSED),
    )
    for our_list, their_list, layers, scales, fused in tables:
        for index in range(checkpoint.count(rf"{their_list}\.(\d+)\.")):
            ours, theirs = f"{our_list}.{index}.", f"{their_list}.{index}."
            sources |= _layer_sources(layers, ours, theirs)
            sources |= {f"{ours}{new}.scale": f"{theirs}{old}.weight" for old, new in scales.items()}
            for name, parts in fused.items():
                for kind in _KINDS:
                    names = tuple(f"{theirs}{part}.{kind}" for part in parts)
                    sources[f"{ours}{name}.{kind}"] = Merged(parts=names, merge=torch.cat)
    sources = {name: source for name, source in sources.items() if checkpoint.shapes.keys() & parts_of(source)}
    used = {part for source in sources.values() for part in parts_of(source)}
    return sources | {name: name for name in checkpoint.shapes if name not in used}


def _layer_sources(table: Mapping[str, str], ours: str = "", theirs: str = "") -> dict[str, Source]:
    return {f"{ours}{new}.{kind}": f"{theirs}{old}.{kind}" for old, new in table.items() for kind in _KINDS}


def _swap_halves(parts: list[Tensor]) -> Tensor:
    """diffusers has (scale, shift) where the original has (shift, scale)."""
    scale, shift = parts[0].chunk(2)
    return torch.cat([shift, scale])


_AUTOENCODER_WORDS = (
    ("conv_norm_out", "norm_out"),
    ("mid_block.resnets.0", "mid.block_1"),
    ("mid_block.resnets.1", "mid.block_2"),
    ("mid_block.attentions.0.group_norm", "mid.attn_1.norm"),
    ("mid_block.attentions.0.to_q", "mid.attn_1.q"),
    ("mid_block.attentions.0.to_k", "mid.attn_1.k"),
    ("mid_block.attentions.0.to_v", "mid.attn_1.v"),
    ("mid_block.attentions.0.to_out.0", "mid.attn_1.proj_out"),
    ("conv_shortcut", "nin_shortcut"),
    ("downsamplers.0", "downsample"),
    ("upsamplers.0", "upsample"),
    ("resnets", "block"),
    ("down_blocks", "down"),
)


def autoencoder_sources(checkpoint: Checkpoint) -> dict[str, Source]:
    """What each of the autoencoder's tensors is made of."""
    levels = checkpoint.count(r"decoder\.up_blocks\.(\d+)\.")
    sources: dict[str, Source] = {}
    for theirs, shape in checkpoint.shapes.items():
        ours = theirs
        for word, original in _AUTOENCODER_WORDS:
            ours = ours.replace(word, original)
        if ".up_blocks." in ours:  # diffusers counts the decoder's levels from the latents up
            head, tail = ours.split("up_blocks.")
            level, rest = tail.split(".", 1)
            ours = f"{head}up.{levels - 1 - int(level)}.{rest}"
        linear = ".attn_1." in ours and len(shape) == 2
        sources[ours] = Merged(parts=(theirs,), merge=_as_convolution) if linear else theirs
    return sources


def _as_convolution(parts: list[Tensor]) -> Tensor:
    return parts[0][:, :, None, None]
