"""The embedded model's backbone with its two text encoders as one trainable module, and its files.

Shape suffixes: B batch, L tokens, D width, C cells in a token, S solids, P palette colours.
"""

from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from fast_flux import FastFlux
from object_cells import CELLS, COLORS, SOLIDS
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerBase, T5Config, T5EncoderModel

from library.files import save_tensors, write_json
from library.flux.attention import KERNELS
from library.flux.latents import image_ids
from library.flux.model import Flux
from library.flux.text import TextFeatures, load_clip, load_t5
from library.flux.variants import VARIANTS
from library.flux.weights import load_flux

FLUX_FILE, CLIP_FILE, T5_FILE = "flux1-tiny.safetensors", "clip_l.safetensors", "t5xxl_fp16.safetensors"
CLIP_LAYERS, CLIP_HEADS = 2, 2
T5_LAYERS, T5_HEADS = 3, 4
CLIP_SETTINGS = ("num_attention_heads", "hidden_act", "layer_norm_eps", "bos_token_id", "eos_token_id")
T5_SETTINGS = ("feed_forward_proj", "relative_attention_max_distance", "layer_norm_epsilon")
TAP = 1  # single-stream block, about half-way, after which the heads read
CONDITION_STD = 0.02  # start of the embedders of noise level, guidance and pooled text, as in DiT (arXiv 2212.09748)


class Prediction(NamedTuple):
    """What a backbone in training answers: the velocity noise - x_0, and what is read off its middle blocks.

    Attributes:
        velocity_BLD: what Flux answers.
        depth_BLD: clean depth latents.
        solid_BLCS: logits of the solid that a cell shows, background first.
        color_BLCP: logits of its colour, background first.
    """

    velocity_BLD: Tensor
    depth_BLD: Tensor
    solid_BLCS: Tensor
    color_BLCP: Tensor


class TextToImage(nn.Module):
    """CLIP, T5 and Flux: token ids and noisy latents in, velocity out.

    While it trains, linear heads read the clean depth latents, and which solids are where, off the middle of the image
    stream. A big backbone learns the geometry and the words of its pictures from their number; this one is told
    (compare the alignment with a pretrained encoder's features of Yu et al., arXiv 2410.06940). The heads are in none
    of the saved files.
    """

    def __init__(self, *, clip: CLIPTextModel, t5: T5EncoderModel, flux: Flux) -> None:
        super().__init__()
        self.clip, self.t5, self.flux = clip, t5, flux
        self.flux.kernel = KERNELS["matmul"]  # faster than the fused one for bfloat16 and so few tokens on a CPU
        self.fast = FastFlux.make(flux)
        sizes = {"depth": flux.config.in_channels, "solid": CELLS * SOLIDS, "color": CELLS * COLORS}
        self.heads = nn.ModuleDict({name: nn.Linear(flux.config.hidden_size, size) for name, size in sizes.items()})
        for weight in self.heads.parameters():
            nn.init.zeros_(weight)
        for encoder in (clip, t5):
            encoder.set_attn_implementation("eager")  # likewise

    def encode(self, clip_ids_BL: Tensor, t5_ids_BL: Tensor) -> TextFeatures:
        """Run both text encoders; padding attends, as it will when the model is used."""
        return TextFeatures(
            tokens_BLD=self.t5(input_ids=t5_ids_BL).last_hidden_state,
            pooled_BD=self.clip(input_ids=clip_ids_BL).pooler_output,
        )

    def forward(self, x_BLD: Tensor, *, t_B: Tensor, guidance_B: Tensor, text: TextFeatures) -> Prediction:
        """Predict the velocity of square noisy pictures, and read the heads."""
        side = round(x_BLD.shape[-2] ** 0.5)
        ids = image_ids(side, side, device=x_BLD.device)
        x_BLD = x_BLD.to(self.flux.img_in.weight.dtype)
        if self.fast is not None and x_BLD.dtype == torch.bfloat16:
            velocity, hidden = self.fast(x_BLD, t_B=t_B, guidance_B=guidance_B, text=text, image_ids=ids, tap=TAP)
        else:
            kept: list[Tensor] = []
            hook = self.flux.single_blocks[TAP].register_forward_hook(lambda _module, _inputs, out: kept.append(out))
            velocity = self.flux(x_BLD, t_B=t_B, guidance_B=guidance_B, text=text, image_ids=ids)
            hook.remove()
            hidden = kept[0][..., -x_BLD.shape[-2] :, :]
        read = {name: head(F.layer_norm(hidden, hidden.shape[-1:])) for name, head in self.heads.items()}
        solid_BLCS, color_BLCP = (read[name].unflatten(-1, (CELLS, -1)) for name in ("solid", "color"))
        return Prediction(velocity, read["depth"], solid_BLCS, color_BLCP)


def new_model(
    *, clip_tokenizer: PreTrainedTokenizerBase, t5_tokenizer: PreTrainedTokenizerBase, generator: torch.Generator
) -> TextToImage:
    """Make an untrained model that fits the two tokenizers."""
    sizes = VARIANTS["tiny"].flux
    clip_config = CLIPTextConfig(
        vocab_size=len(clip_tokenizer),
        hidden_size=sizes.vec_in_dim,
        projection_dim=sizes.vec_in_dim,
        intermediate_size=4 * sizes.vec_in_dim,
        num_hidden_layers=CLIP_LAYERS,
        num_attention_heads=CLIP_HEADS,
        max_position_embeddings=clip_tokenizer.model_max_length,
        hidden_act="gelu",
        bos_token_id=clip_tokenizer.bos_token_id,
        eos_token_id=clip_tokenizer.eos_token_id,
        pad_token_id=clip_tokenizer.pad_token_id,
    )
    t5_config = T5Config(
        vocab_size=len(t5_tokenizer),
        d_model=sizes.context_in_dim,
        d_kv=sizes.context_in_dim // T5_HEADS,
        d_ff=2 * sizes.context_in_dim,
        num_layers=T5_LAYERS,
        num_heads=T5_HEADS,
        relative_attention_max_distance=64,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(generator.initial_seed())  # transformers' own random start draws from the global generator
        model = TextToImage(clip=CLIPTextModel(clip_config), t5=T5EncoderModel(t5_config), flux=Flux(sizes))
    start_flux(model.flux, generator=generator)
    return model.eval()  # no dropout: gradients flow all the same


@torch.no_grad()
def start_flux(flux: Flux, *, generator: torch.Generator) -> None:
    """Xavier-uniform linears without bias; modulations and the last layer zero, so that blocks start as identity."""
    for name, layer in flux.named_modules():
        if not isinstance(layer, nn.Linear):
            continue
        if layer.bias is not None:
            layer.bias.zero_()
        if name.endswith(("_mod.lin", "modulation.lin")) or name.startswith("final_layer."):
            layer.weight.zero_()
        elif name.startswith(("time_in.", "vector_in.", "guidance_in.")):
            layer.weight.normal_(std=CONDITION_STD, generator=generator)
        else:
            nn.init.xavier_uniform_(layer.weight, generator=generator)


def is_hidden_matrix(name: str, weight: Tensor) -> bool:
    """Whether Muon may have this weight: a matrix between hidden layers, no embedding and no first or last layer."""
    outer = (
        "embed",
        "shared",
        "relative_attention_bias",
        "flux.img_in",
        "flux.txt_in",
        "flux.final",
        "_in.",
        "mod",
        "heads",
    )
    return weight.ndim == 2 and not any(part in name for part in outer)


def load_model(folder: Path) -> TextToImage:
    """Load a model that `save_model` wrote, in float32 and with gradients."""
    t5, _ = load_t5(folder / T5_FILE)
    model = TextToImage(clip=load_clip(folder / CLIP_FILE), t5=t5, flux=load_flux(folder / FLUX_FILE))
    return model.requires_grad_(True)


def save_model(model: TextToImage, folder: Path, *, t5_length: int) -> None:
    """Write the three files in the released formats and names: bfloat16 backbone and CLIP, float16 T5."""
    sizes = asdict(VARIANTS["tiny"].flux)
    clip = {f"text_model.{name}": tensor for name, tensor in model.clip.state_dict().items()}
    t5 = {name: tensor for name, tensor in model.t5.state_dict().items() if name != "encoder.embed_tokens.weight"}
    clip_config = {name: getattr(model.clip.config, name) for name in CLIP_SETTINGS} | {"model_type": "clip_text_model"}
    t5_config = {name: getattr(model.t5.config, name) for name in T5_SETTINGS}
    t5_config |= {"model_type": "t5", "token_length": t5_length}
    write_json(folder / CLIP_FILE.replace(".safetensors", ".json"), clip_config)
    write_json(folder / T5_FILE.replace(".safetensors", ".json"), t5_config)
    save_tensors(folder / CLIP_FILE, _cast(clip, torch.bfloat16))
    save_tensors(folder / T5_FILE, _cast(t5, torch.float16))
    save_tensors(folder / FLUX_FILE, _cast(model.flux.state_dict(), torch.bfloat16), {"config": sizes})


def _cast(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}
