"""A whole model of random weights in the released file formats: small enough that all tasks run in a blink."""

import atexit
import shutil
from dataclasses import asdict
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from library.files import save_tensors, write_json
from library.flux.autoencoder import Autoencoder
from library.flux.model import Flux
from library.flux.variants import AutoencoderConfig, FluxConfig
from scripts.tiny.train_tokenizers import train_clip, train_t5

FLUX = FluxConfig(
    vec_in_dim=32,
    context_in_dim=48,
    hidden_size=64,
    num_heads=2,
    depth=1,
    depth_single_blocks=2,
    axes_dim=(8, 12, 12),
    guidance_embed=False,
)
AUTOENCODER = AutoencoderConfig(ch=8, num_res_blocks=1, num_groups=1)
CLIP_LENGTH, T5_LENGTH = 16, 12
_CAPTIONS = [
    "a red ball on a blue box",
    "a green cone behind a grey cylinder in a bright room",
    "open ground at sunset",
]


def randomize(module: nn.Module, *, seed: int, scale: float = 1.0) -> nn.Module:
    """Fill all weights with normal numbers of a size that keeps activations moderate."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        spread = scale / max(1, parameter[0].numel()) ** 0.5 if parameter.dim() > 1 else 0.1
        parameter.data = torch.randn(parameter.shape, generator=generator) * spread + (parameter.dim() == 1)
    return module.eval().requires_grad_(False)


def write_tiny_model(folder: Path) -> dict[str, Path]:
    """Write all weights, tokenizers and JSON files into `folder`; return the five weight flags' paths."""
    from library.jointdit.addons import AddonSettings, base_fingerprint, new_jointdit, save_addons, trainable_parameters
    from library.jointdit.model import LoraRanks

    paths = {
        "pretrained_model_name_or_path": folder / "flux1-tiny.safetensors",
        "clip_l": folder / "clip_l.safetensors",
        "t5xxl": folder / "t5xxl_fp16.safetensors",
        "ae": folder / "ae.safetensors",
        "jointdit_addons_path": folder / "jointdit_addons.safetensors",
    }
    flux = paths["pretrained_model_name_or_path"]
    save_tensors(flux, randomize(Flux(FLUX), seed=0, scale=0.5).state_dict())
    write_json(flux.with_suffix(".json"), {"axes_dim": FLUX.axes_dim, "theta": FLUX.theta})
    save_tensors(paths["ae"], randomize(Autoencoder(AUTOENCODER), seed=1).state_dict())
    write_json(paths["ae"].with_suffix(".json"), asdict(AUTOENCODER))
    _write_text_encoders(folder, clip_path=paths["clip_l"], t5_path=paths["t5xxl"])

    ranks = LoraRanks(blocks=4, vector_in=4, vector_out=4, text_in=4)
    model = new_jointdit(flux=flux, ranks=ranks, generator=torch.Generator().manual_seed(4))
    generator = torch.Generator().manual_seed(5)
    for _, parameter in trainable_parameters(model):
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    save_addons(paths["jointdit_addons_path"], model, settings=AddonSettings(base=base_fingerprint(flux)))
    return paths


def _write_text_encoders(folder: Path, *, clip_path: Path, t5_path: Path) -> None:
    clip_tokenizer = train_clip(_CAPTIONS, folder=folder / "tokenizer", length=CLIP_LENGTH)
    t5_tokenizer = train_t5(_CAPTIONS, folder=folder / "tokenizer_2", length=T5_LENGTH)
    clip = CLIPTextConfig(
        vocab_size=len(clip_tokenizer),
        hidden_size=FLUX.vec_in_dim,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=CLIP_LENGTH,
        bos_token_id=clip_tokenizer.bos_token_id,
        eos_token_id=clip_tokenizer.eos_token_id,
        pad_token_id=clip_tokenizer.pad_token_id,
    )
    tensors = randomize(CLIPTextModel(clip), seed=2).state_dict()
    save_file({f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in tensors.items()}, clip_path)
    told = ("num_attention_heads", "bos_token_id", "eos_token_id")
    write_json(clip_path.with_suffix(".json"), {name: getattr(clip, name) for name in told})
    t5 = T5Config(
        vocab_size=len(t5_tokenizer),
        d_model=FLUX.context_in_dim,
        d_kv=16,
        d_ff=64,
        num_layers=1,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
    )
    tensors = randomize(T5EncoderModel(t5), seed=3).state_dict()
    save_file({name: tensor for name, tensor in tensors.items() if name != "encoder.embed_tokens.weight"}, t5_path)
    write_json(t5_path.with_suffix(".json"), {"token_length": T5_LENGTH})


@cache
def tiny_model() -> dict[str, Path]:
    """Return the weight flags' paths of one such model, written once for all tests of a run; never write to it."""
    folder = Path(mkdtemp(prefix="jointdit-tiny-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return write_tiny_model(folder)
