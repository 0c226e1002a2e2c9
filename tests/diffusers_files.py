"""Checkpoints in diffusers' folders: the inverse of what the library reads, told from diffusers' side."""

import json
import re
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

STREAMS = {  # ours -> diffusers, in a double-stream block
    "img_attn.norm.query_norm.scale": "attn.norm_q.weight",
    "img_attn.norm.key_norm.scale": "attn.norm_k.weight",
    "txt_attn.norm.query_norm.scale": "attn.norm_added_q.weight",
    "txt_attn.norm.key_norm.scale": "attn.norm_added_k.weight",
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
    "img_mod.lin": "norm1.linear",
    "txt_mod.lin": "norm1_context.linear",
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
}
EMBEDDERS = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "final_layer.linear": "proj_out",
}
SINGLES = {
    "modulation.lin": "norm.linear",
    "linear2": "proj_out",
    "norm.query_norm.scale": "attn.norm_q.weight",
    "norm.key_norm.scale": "attn.norm_k.weight",
}


def transformer_tensors(original: dict[str, Tensor], *, width: int) -> dict[str, Tensor]:
    """Rename and cut the original tensors as diffusers has them."""
    theirs: dict[str, Tensor] = {}
    for name, tensor in original.items():
        kind = name.rpartition(".")[2]
        if name.startswith("final_layer.adaLN_modulation.1"):
            shift, scale = tensor.chunk(2)
            theirs[f"norm_out.linear.{kind}"] = torch.cat([scale, shift])
            continue
        block = re.match(r"(double|single)_blocks\.(\d+)\.(.*)", name)
        if block is None:
            theirs[f"{EMBEDDERS[name.removesuffix('.' + kind)]}.{kind}"] = tensor
            continue
        family, index, inner = block.groups()
        prefix = f"{'transformer_blocks' if family == 'double' else 'single_transformer_blocks'}.{index}."
        layer = inner.removesuffix("." + kind)
        if inner in (table := STREAMS if family == "double" else SINGLES):
            theirs[prefix + table[inner]] = tensor
        elif layer in table:
            theirs[f"{prefix}{table[layer]}.{kind}"] = tensor
        else:
            parts = {
                "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
                "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
                "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
            }[layer]
            widths = [width] * 3 + [len(tensor) - 3 * width] * (len(parts) - 3)
            for part, piece in zip(parts, tensor.split(widths), strict=True):
                theirs[f"{prefix}{part}.{kind}"] = piece
    return theirs


def autoencoder_tensors(original: dict[str, Tensor], *, levels: int) -> dict[str, Tensor]:
    """Rename the original tensors as diffusers has them; its middle attention is made of linear layers."""
    theirs: dict[str, Tensor] = {}
    for name, tensor in original.items():
        head, rest = name.split(".", 1)
        if found := re.match(r"(down|up)\.(\d+)\.(block\.(\d+)|downsample|upsample)\.(.*)", rest):
            way, level, part, block, inner = found.groups()
            place = int(level) if way == "down" else levels - 1 - int(level)
            layer = f"resnets.{block}" if block is not None else f"{part}rs.0"
            rest = f"{way}_blocks.{place}.{layer}.{inner.replace('nin_shortcut', 'conv_shortcut')}"
        elif rest.startswith("mid.block_"):
            number, inner = rest.removeprefix("mid.block_").split(".", 1)
            rest = f"mid_block.resnets.{int(number) - 1}.{inner}"
        elif rest.startswith("mid.attn_1."):
            layer, kind = rest.removeprefix("mid.attn_1.").split(".")
            names = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
            rest = f"mid_block.attentions.0.{names[layer]}.{kind}"
            tensor = tensor.flatten(1) if tensor.dim() == 4 else tensor
        elif rest.startswith("norm_out"):
            rest = f"conv_{rest}"
        theirs[f"{head}.{rest}"] = tensor.contiguous()
    return theirs


def save_shards(folder: Path, tensors: dict[str, Tensor], *, config: dict[str, object], stem: str) -> None:
    """Write two shards with their index, and the configuration."""
    folder.mkdir(parents=True)
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[: len(names) // 3], names[len(names) // 3 :]), start=1):
        file = f"{stem}-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name].contiguous() for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config))
