"""CLIP-L's and T5-XXL's text encoders from single safetensors files or transformers folders.

Sizes are read off the tensors. What shapes can't tell comes, in this order, from `<stem>.json`, `config.json` in the
same folder, the file's header (JSON under the key `jointdit`), and the defaults of the two published encoders; every
stated size is checked against the tensors.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from library.flux.checkpoint import Checkpoint, fill, open_checkpoint

if TYPE_CHECKING:
    from transformers import CLIPTextModel, T5EncoderModel

logger = logging.getLogger(__name__)

CLIP_FLAG = "--clip_l"
T5_FLAG = "--t5xxl"
CLIP_ACTIVATIONS = ("gelu", "quick_gelu")

_CLIP_DEFAULTS = {"num_attention_heads": 12, "bos_token_id": 49406, "eos_token_id": 49407, "layer_norm_eps": 1e-5}
_T5_DEFAULTS = {"relative_attention_max_distance": 128, "layer_norm_epsilon": 1e-6, "token_length": 512}
_CLIP_PREFIX = "text_model."
_CLIP_EXTRA = re.compile(r"(embeddings\.position_ids|logit_scale|text_projection(\.weight)?)$")
_T5_EXTRA = re.compile(r"(decoder\..*|lm_head\.weight|encoder\.embed_tokens\.weight)$")


def load_clip(
    path: str | Path,
    *,
    activation: str = "gelu",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> CLIPTextModel:
    """Load CLIP's text encoder, in eval mode and without gradients.

    Args:
        path: `clip_l.safetensors` or a transformers folder; names with and without `text_model.` both load.
        activation: "gelu" (exact; what the released JointDiT add-ons were trained with, although OpenAI's configuration
            says otherwise) or "quick_gelu" (x sigmoid(1.702 x), OpenAI's own). This setting alone decides.
        dtype: of the weights.
        device: of the weights.

    Raises:
        UserError: naming `--clip_l`, the file and the first names, if one is missing, unknown or of a wrong size.
    """
    from transformers import CLIPTextConfig, CLIPTextModel  # seconds to import, and only needed where text is encoded

    if activation not in CLIP_ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is none of {CLIP_ACTIVATIONS}")
    checkpoint = open_checkpoint(path, flag=CLIP_FLAG, model_types=("clip_text_model", "clip"))
    tensors = _select(checkpoint, strip=_CLIP_PREFIX, extra=_CLIP_EXTRA)
    checkpoint = _renamed(checkpoint, tensors)
    vocabulary, width = checkpoint.shape("embeddings.token_embedding.weight")
    sizes = checkpoint.checked(
        {
            "vocab_size": vocabulary,
            "hidden_size": width,
            "max_position_embeddings": checkpoint.shape("embeddings.position_embedding.weight")[0],
            "intermediate_size": checkpoint.shape("encoder.layers.0.mlp.fc1.weight")[0],
            "num_hidden_layers": checkpoint.count(r"encoder\.layers\.(\d+)\."),
        }
    )
    rest = {name: checkpoint.config.get(name, default) for name, default in _CLIP_DEFAULTS.items()}
    _require_clip_settings(checkpoint, rest, vocabulary=vocabulary, width=width)
    # transformers would warn of a padding id beyond the vocabulary; it plays no part in the encoder.
    padding = rest["eos_token_id"]
    config = CLIPTextConfig(**sizes, **rest, hidden_act=activation, projection_dim=width, pad_token_id=padding)
    model = fill(lambda: CLIPTextModel(config), checkpoint, tensors, dtype=dtype, device=device)
    # not part of the state dict, so it is still on the meta device
    model.embeddings.position_ids = torch.arange(config.max_position_embeddings, device=device)[None]
    return model


def load_t5(
    path: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> tuple[T5EncoderModel, int]:
    """Load T5's encoder, in eval mode and without gradients, and the number of tokens it is used with.

    Args:
        path: `t5xxl_fp16.safetensors` or a transformers folder (shards too); a decoder in it is passed over.
        dtype: of the weights.
        device: of the weights.

    Raises:
        UserError: naming `--t5xxl`, the file and the first names, if one is missing, unknown or of a wrong size.
    """
    from transformers import T5Config, T5EncoderModel

    checkpoint = open_checkpoint(path, flag=T5_FLAG, model_types=("t5",))
    tensors = _select(checkpoint, strip="", extra=_T5_EXTRA)
    vocabulary, width = checkpoint.shape("shared.weight")
    block = "encoder.block.0.layer"
    buckets, heads = checkpoint.shape(f"{block}.0.SelfAttention.relative_attention_bias.weight")
    gated = f"{block}.1.DenseReluDense.wi_0.weight" in checkpoint.shapes
    sizes = checkpoint.checked(
        {
            "vocab_size": vocabulary,
            "d_model": width,
            "num_heads": heads,
            "relative_attention_num_buckets": buckets,
            "d_kv": checkpoint.shape(f"{block}.0.SelfAttention.q.weight")[0] // heads,
            "d_ff": checkpoint.shape(f"{block}.1.DenseReluDense.{'wi_0' if gated else 'wi'}.weight")[0],
            "num_layers": checkpoint.count(r"encoder\.block\.(\d+)\."),
        }
    )
    activation = checkpoint.config.get("feed_forward_proj", "gated-gelu" if gated else "relu")
    if activation.startswith("gated-") != gated:
        raise checkpoint.fail(f"its configuration says feed_forward_proj = {activation}, its tensors say otherwise")
    rest = {name: checkpoint.config.get(name, default) for name, default in _T5_DEFAULTS.items()}
    token_length = rest.pop("token_length")
    config = T5Config(**sizes, **rest, feed_forward_proj=activation, is_encoder_decoder=False, use_cache=False)
    tensors["encoder.embed_tokens.weight"] = "shared.weight"
    model = fill(lambda: T5EncoderModel(config), checkpoint, tensors, dtype=dtype, device=device)
    model.encoder.embed_tokens.weight = model.shared.weight  # one parameter again: .to() would make it two
    return model, token_length


def token_lengths(clip_path: str | Path, t5_path: str | Path) -> tuple[int, int]:
    """Return how many tokens of a prompt CLIP and T5 read, from the files' headers alone.

    Raises:
        UserError: naming `--clip_l` or `--t5xxl`, if the file is missing or another model's.
    """
    clip = open_checkpoint(clip_path, flag=CLIP_FLAG, model_types=("clip_text_model", "clip"))
    clip = _renamed(clip, _select(clip, strip=_CLIP_PREFIX, extra=_CLIP_EXTRA))
    t5 = open_checkpoint(t5_path, flag=T5_FLAG, model_types=("t5",))
    t5.shape("shared.weight")
    positions = clip.shape("embeddings.position_embedding.weight")[0]
    return positions, t5.config.get("token_length", _T5_DEFAULTS["token_length"])


def _require_clip_settings(checkpoint: Checkpoint, rest: Mapping[str, Any], *, vocabulary: int, width: int) -> None:
    beside = f"say the true one in {checkpoint.path.with_suffix('.json').name}"
    if width % rest["num_attention_heads"]:
        raise checkpoint.fail(f"{rest['num_attention_heads']} heads don't divide its width {width}; {beside}")
    for name in ("bos_token_id", "eos_token_id"):
        if not 0 <= rest[name] < vocabulary:
            raise checkpoint.fail(f"{name} {rest[name]} is beyond its vocabulary of {vocabulary}; {beside}")


def _select(checkpoint: Checkpoint, *, strip: str, extra: re.Pattern[str]) -> dict[str, str]:
    """Map the model's names to the file's, without `strip` and without the extras that real files have."""
    names = {name.removeprefix(strip): name for name in checkpoint.files}
    return {ours: theirs for ours, theirs in names.items() if not extra.match(ours)}


def _renamed(checkpoint: Checkpoint, names: Mapping[str, str]) -> Checkpoint:
    shapes = {ours: checkpoint.shapes[theirs] for ours, theirs in names.items()}
    return replace(checkpoint, shapes=shapes)
