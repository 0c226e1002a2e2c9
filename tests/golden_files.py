"""The recorded inputs and outputs of the released code, as tensors of this project's shapes."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from safetensors.torch import load_file
from torch import Tensor

from library import TextFeatures
from library.flux.variants import FluxConfig
from library.jointdit.model import LoraRanks

GOLDENS = Path(__file__).parent / "goldens"
RANKS = LoraRanks(blocks=8, vector_in=16, vector_out=32, text_in=32)
SIDECAR = {"depth_transform": "none", "is_attnmask_training": False, "is_txt_ids_training": False}


def facts(name: str) -> dict[str, Any]:
    """Return what is written about a group of recordings."""
    return json.loads((GOLDENS / f"{name}.json").read_text())


def tensors(name: str) -> dict[str, Tensor]:
    """Return a recording; its numbers, stored exactly in few bits, as float32."""
    recorded = load_file(GOLDENS / f"{name}.safetensors")
    return {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in recorded.items()}


def tiny_config(**changes: Any) -> FluxConfig:
    """Return the sizes of the recorded backbone."""
    sizes = facts("jointdit_tiny")["flux_params"]
    return FluxConfig(**sizes | {"axes_dim": tuple(sizes["axes_dim"])} | changes)


def lay_tiny_model(folder: Path) -> tuple[Path, Path]:
    """Copy the recorded backbone and add-ons into a folder, with the JSON files that belong beside them."""
    flux, addons = folder / "base.safetensors", folder / "jointdit_addons.safetensors"
    shutil.copy(GOLDENS / "jointdit_tiny.base.safetensors", flux)
    shutil.copy(GOLDENS / "jointdit_tiny.addons.safetensors", addons)
    flux.with_suffix(".json").write_text(json.dumps({"axes_dim": [4, 14, 14]}))
    addons.with_suffix(".json").write_text(json.dumps(SIDECAR))
    return flux, addons


def by_modality(batch: Tensor) -> Tensor:
    """Turn a released batch [RGB half ; depth half] into (M, B, ...)."""
    return rearrange(batch, "(M B) ... -> M B ...", M=2)


@dataclass(frozen=True, kw_only=True, slots=True)
class JointCase:
    """Inputs and output of one recorded call of JointDiT."""

    x_MBLD: Tensor
    inputs: dict[str, Any]
    v_MBLD: Tensor


def joint_case(name: str) -> JointCase:
    """Return a recorded case; inputs that it shares with another are looked up there."""
    recorded = tensors("jointdit_tiny.cases")
    found = {key.removeprefix(f"{name}/"): tensor for key, tensor in recorded.items() if key.startswith(f"{name}/")}
    for line in facts("jointdit_tiny")["cases"][name]["inputs_shared_with_other_cases"]:
        key, _, source = line.partition(": see ")
        found[key] = recorded[source]
    mask = found.get("txt_attention_mask")
    whole_mask = mask is not None and len(mask) == len(found["img"])
    text = TextFeatures(
        tokens_BLD=by_modality(found["txt"]),
        pooled_BD=by_modality(found["y"]),
        mask_BL=by_modality(mask) if whole_mask else mask,
        ids_BL3=by_modality(found["txt_ids"]),
    )
    inputs = {
        "t_MB": by_modality(found["timesteps"]),
        "text": text,
        "image_ids": found["img_ids"][0],
        "guidance_B": by_modality(found["guidance"]),
    }
    return JointCase(x_MBLD=by_modality(found["img"]), inputs=inputs, v_MBLD=by_modality(found["out"]))


def assert_near(actual: Tensor, expected: Tensor, *, within: float = 1e-4) -> None:
    """Assert equal shapes and an absolute difference of at most `within` everywhere."""
    torch.testing.assert_close(actual, expected, atol=within, rtol=0)
