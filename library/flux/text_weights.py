"""CLIP-L's and T5-XXL's text encoders from single safetensors files or transformers folders.

Sizes are read off the tensors. What shapes can't tell comes, in this order, from `<stem>.json`, `config.json` in the
same folder, the file's header (JSON under the key `jointdit`), and the defaults of the two published encoders; every
stated size is checked against the tensors.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from library.errors import UserError

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


@dataclass(frozen=True, kw_only=True, slots=True)
class _Checkpoint:
    """Where every tensor of a checkpoint lies, and the settings told beside it."""

    flag: str
    path: Path
    files: Mapping[str, Path]
    shapes: Mapping[str, tuple[int, ...]]
    config: Mapping[str, Any]

    def fail(self, what: str) -> UserError:
        return UserError(f"{self.flag} {self.path}: {what}")

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self.shapes:
            found = ", ".join(sorted(self.shapes)[:3]) or "nothing"
            raise self.fail(f"no tensor {name}, so this isn't the encoder this flag wants (it holds {found}, ...)")
        return self.shapes[name]

    def count(self, pattern: str) -> int:
        """Number of layers: 1 + the highest index that `pattern`'s group finds among the names."""
        return 1 + max((int(found[1]) for name in self.shapes if (found := re.match(pattern, name))), default=-1)

    def checked(self, sizes: Mapping[str, Any]) -> dict[str, Any]:
        """Return `sizes` (read off the tensors) after comparing them with what the configuration states."""
        for name, size in sizes.items():
            stated = self.config.get(name, size)
            if stated != size:
                raise self.fail(f"its configuration says {name} = {stated}, its tensors {size}; mend the JSON")
        return dict(sizes)


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
    checkpoint = _open(path, flag=CLIP_FLAG, model_types=("clip_text_model", "clip"))
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
    model = _build(lambda: CLIPTextModel(config), checkpoint, tensors, dtype=dtype, device=device)
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

    checkpoint = _open(path, flag=T5_FLAG, model_types=("t5",))
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
    model = _build(lambda: T5EncoderModel(config), checkpoint, tensors, dtype=dtype, device=device)
    model.encoder.embed_tokens.weight = model.shared.weight  # one parameter again: .to() would make it two
    return model, token_length


def _require_clip_settings(checkpoint: _Checkpoint, rest: Mapping[str, Any], *, vocabulary: int, width: int) -> None:
    beside = f"say the true one in {checkpoint.path.with_suffix('.json').name}"
    if width % rest["num_attention_heads"]:
        raise checkpoint.fail(f"{rest['num_attention_heads']} heads don't divide its width {width}; {beside}")
    for name in ("bos_token_id", "eos_token_id"):
        if not 0 <= rest[name] < vocabulary:
            raise checkpoint.fail(f"{name} {rest[name]} is beyond its vocabulary of {vocabulary}; {beside}")


def _open(path: str | Path, *, flag: str, model_types: Collection[str]) -> _Checkpoint:
    """Read names and shapes only; tensors are read one by one later."""
    path = Path(path)
    files = _safetensors_files(path, flag=flag)
    owner: dict[str, Path] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    header: dict[str, Any] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                header |= json.loads((opened.metadata() or {}).get("jointdit", "{}"))
                for name in opened.keys():  # noqa: SIM118 - a safe_open is no mapping
                    owner[name] = file
                    shapes[name] = tuple(opened.get_slice(name).get_shape())
        except (SafetensorError, OSError) as error:
            raise UserError(f"{flag} {file}: not a readable safetensors file ({error})") from error
    config = dict(header.get("config", header))
    folder = path if path.is_dir() else path.parent
    config |= _read_config(folder / "config.json", flag=flag, model_types=model_types)
    if path.is_file():
        config |= _read_config(path.with_suffix(".json"), flag=flag, model_types=model_types)
    return _Checkpoint(flag=flag, path=path, files=owner, shapes=shapes, config=config)


def _safetensors_files(path: Path, *, flag: str) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{flag} {path}: no such file or folder")
    files = (
        [path / "model.safetensors"] if (path / "model.safetensors").is_file() else sorted(path.glob("*.safetensors"))
    )
    for index in sorted(path.glob("*.safetensors.index.json")):
        files = [path / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise UserError(f"{flag} {path}: {index.name} names {', '.join(missing[:3])}, which isn't there")
    if not files:
        raise UserError(f"{flag} {path}: no safetensors file in this folder")
    return files


def _read_config(path: Path, *, flag: str, model_types: Collection[str]) -> dict[str, Any]:
    """Return a JSON file's settings; nothing if it isn't there or is another model's (folders are often shared)."""
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{flag} {path}: not readable as JSON ({error})") from error
    if not isinstance(config, dict) or "_class_name" in config:
        return {}
    if config.get("model_type", next(iter(model_types))) not in model_types:
        return {}
    return config.get("text_config") or config


def _select(checkpoint: _Checkpoint, *, strip: str, extra: re.Pattern[str]) -> dict[str, str]:
    """Map the model's names to the file's, without `strip` and without the extras that real files have."""
    names = {name.removeprefix(strip): name for name in checkpoint.files}
    return {ours: theirs for ours, theirs in names.items() if not extra.match(ours)}


def _renamed(checkpoint: _Checkpoint, names: Mapping[str, str]) -> _Checkpoint:
    shapes = {ours: checkpoint.shapes[theirs] for ours, theirs in names.items()}
    return _Checkpoint(
        flag=checkpoint.flag, path=checkpoint.path, files=checkpoint.files, shapes=shapes, config=checkpoint.config
    )


def _build(
    make: Callable[[], nn.Module],
    checkpoint: _Checkpoint,
    names: Mapping[str, str],
    *,
    dtype: torch.dtype,
    device: torch.device | str,
) -> Any:
    """Make the module on the meta device, check every name and shape, then fill it tensor by tensor."""
    with torch.device("meta"):
        model = make()
    wanted = model.state_dict()
    for what, wrong in (("lacks", wanted.keys() - names.keys()), ("has the unknown", names.keys() - wanted.keys())):
        if wrong:
            raise checkpoint.fail(f"{what} {', '.join(sorted(wrong)[:3])} ({len(wrong)} tensors)")
    loaded: dict[str, Tensor] = {}
    for file in sorted(set(checkpoint.files.values())):
        with safe_open(file, framework="pt") as opened:
            for theirs in {theirs for theirs in names.values() if checkpoint.files[theirs] == file}:
                loaded[theirs] = opened.get_tensor(theirs).to(device=device, dtype=dtype)
    for ours, theirs in names.items():
        if loaded[theirs].shape != wanted[ours].shape:
            raise checkpoint.fail(
                f"{ours} has the shape {tuple(loaded[theirs].shape)}, expected {tuple(wanted[ours].shape)}"
            )
    model.load_state_dict({ours: loaded[theirs] for ours, theirs in names.items()}, assign=True)
    return model.eval().requires_grad_(False)
