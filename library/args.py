"""Groups of flags that several commands share; a command's own flags are a class that derives from these."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from library.cli import local_rank
from library.errors import UserError
from library.flags import Flags, NoEffect, flag, flag_values, parse
from library.flux.text_weights import CLIP_ACTIVATIONS
from library.quantize import FORMATS

__all__ = [
    "AutoencoderArgs",
    "Flags",
    "ModelArgs",
    "NoEffect",
    "RuntimeArgs",
    "TextEncoderArgs",
    "TransformerArgs",
    "flag",
    "flag_values",
    "parse",
]

MAX_T5_LENGTH = 512  # of any FLUX.1


@dataclass(frozen=True, kw_only=True)
class TransformerArgs(Flags):
    """Weights of the transformer."""

    pretrained_model_name_or_path: Path | None = flag(
        None, help="FLUX.1 transformer: the original single file or a diffusers folder", metavar="PATH"
    )
    jointdit_addons_path: Path | None = flag(
        None,
        help="JointDiT add-ons (jointdit_addons.safetensors or jointdit.safetensors), or their folder",
        metavar="PATH",
    )
    base_precision: str | None = flag(
        None, help="hold the frozen weights of the transformer's blocks in 8 or 4 bits; the add-ons and the "
        "computation keep their precision (nf4 needs bitsandbytes)", choices=tuple(FORMATS),
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class AutoencoderArgs(Flags):
    """Weights of the autoencoder."""

    ae: Path | None = flag(
        None, help="FLUX.1 autoencoder: the original single file or a diffusers folder", metavar="PATH"
    )


@dataclass(frozen=True, kw_only=True)
class TextEncoderArgs(Flags):
    """Weights of the text encoders."""

    clip_l: Path | None = flag(None, help="CLIP-L text encoder: a single file or a transformers folder", metavar="PATH")
    t5xxl: Path | None = flag(None, help="T5-XXL text encoder: a single file or a transformers folder", metavar="PATH")
    clip_tokenizer: Path | None = flag(
        None, help="CLIP tokenizer folder (otherwise tokenizer/ beside --clip_l, then the hub)", metavar="FOLDER"
    )
    t5_tokenizer: Path | None = flag(
        None, help="T5 tokenizer folder (otherwise tokenizer_2/ beside --t5xxl, then the hub)", metavar="FOLDER"
    )
    clip_activation: str = flag(
        "gelu",
        help="CLIP's activation: gelu, which the released add-ons were trained with, or OpenAI's own quick_gelu",
        choices=CLIP_ACTIVATIONS,
    )
    t5xxl_max_token_length: int | None = flag(
        None, help="T5 tokens per prompt (otherwise the model's own: 512 for dev, 256 for schnell)", minimum=1,
        maximum=MAX_T5_LENGTH,
    )  # fmt: skip


DEVICES = ("auto", "cuda", "mps", "cpu")


def find_device(kind: str) -> torch.device:
    """Return the device that `--device` names, one of `DEVICES`; with several local processes each takes its own GPU.

    Raises `UserError` if this machine has none of that kind.
    """
    kind = _device_kind(kind)
    if kind == "cuda":
        if not torch.cuda.is_available():
            raise UserError("--device cuda: this PyTorch sees no CUDA device; use --device cpu")
        return torch.device("cuda", local_rank() % torch.cuda.device_count())
    if kind == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: this PyTorch sees no MPS device; use --device cpu")
    return torch.device(kind)


def _device_kind(kind: str) -> str:
    if kind != "auto":
        return kind
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


@dataclass(frozen=True, kw_only=True)
class RuntimeArgs(Flags):
    """Device, precision and memory."""

    device: str = flag("auto", help="where to compute; auto takes CUDA, then MPS, then the CPU",
                       choices=DEVICES)  # fmt: skip
    num_threads: int = flag(0, help="CPU threads; 0 shares the cores among the local processes; a CPU gives the same "
                            "bytes again at the same number only", minimum=0)  # fmt: skip
    mixed_precision: str = flag("no", help="precision of the computation on a GPU", choices=("no", "fp16", "bf16"))
    full_bf16: bool = flag(False, help="hold the weights and compute in bf16; on a CPU only together with --device cpu")
    blocks_to_swap: int = flag(
        0, help="transformer blocks kept in CPU memory and streamed to the GPU, to save its memory", minimum=0
    )
    sdpa: bool = flag(False, help="PyTorch's fused attention: used anyway, but for bf16 training on a CPU")
    xformers: bool = flag(False, help="attention by xformers, on a CUDA device (needs the package)")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sdpa and self.xformers:
            raise UserError("--xformers: --sdpa is given too; choose one kind of attention")

    @property
    def attention(self) -> str:
        """Kind of attention: "sdpa" or "xformers"."""
        return "xformers" if self.xformers else "sdpa"

    def torch_device(self) -> torch.device:
        """Return the device to compute on; with several local processes each takes its own GPU."""
        if self.xformers and importlib.util.find_spec("xformers") is None:
            raise UserError("--xformers: the package isn't installed; pip install -e '.[gpu]', or use --sdpa")
        kind = _device_kind(self.device)
        if self.xformers and kind != "cuda":
            raise UserError(f"--xformers: has no operator for {kind}; use --sdpa")
        return find_device(kind)

    def torch_dtype(self, device: torch.device) -> torch.dtype:
        """Return the precision of weights and computation on `device`.

        On a GPU what the flags ask for. On a CPU float32, since half precision is slow there and the released
        commands all carry the bf16 flags; `--device cpu --full_bf16`, which says both on purpose, is bf16 and halves
        the memory.
        """
        if device.type == "cpu":
            return torch.bfloat16 if self.full_bf16 and self.device == "cpu" else torch.float32
        if self.full_bf16:
            return torch.bfloat16
        return {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[self.mixed_precision]


@dataclass(frozen=True, kw_only=True)
class ModelArgs(RuntimeArgs, TextEncoderArgs, AutoencoderArgs, TransformerArgs):
    """All weights, and how they are held."""

    no_effect: ClassVar = {"save_precision": NoEffect(reason="nothing is saved in a precision of its own")}

    def weight_paths(self) -> dict[str, Path | None]:
        """Return the five weight flags' paths by name, None for one that isn't given."""
        names = ("pretrained_model_name_or_path", "clip_l", "t5xxl", "ae", "jointdit_addons_path")
        return {name: getattr(self, name) for name in names}
