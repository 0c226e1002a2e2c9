"""Loading the backbone and the autoencoder: every format, where sizes come from, and what is refused."""

import json
import re
import shutil

import pytest
import torch
from diffusers_files import autoencoder_tensors, save_shards, transformer_tensors
from golden_files import GOLDENS, facts, lay_tiny_model, tensors, tiny_config
from safetensors.torch import load_file, save_file

from library.errors import UserError
from library.flux.model import Flux
from library.flux.variants import VARIANTS, AutoencoderConfig, FluxConfig
from library.flux.weights import load_autoencoder, load_flux, variant_of
from library.jointdit.model import JointDiT, LoraRanks

FLUX_FLAG = "--pretrained_model_name_or_path"
DIFFUSERS_FLUX = {
    "_class_name": "FluxTransformer2DModel",
    "in_channels": 64,
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": 32,
    "num_attention_heads": 2,
    "joint_attention_dim": 48,
    "pooled_projection_dim": 32,
    "guidance_embeds": True,
    "axes_dims_rope": [4, 14, 14],
}


@pytest.fixture
def base(tmp_path):
    """The recorded backbone as one file, with the JSON file beside it."""
    return lay_tiny_model(tmp_path)[0]


def stored():
    return load_file(GOLDENS / "jointdit_tiny.base.safetensors")


def assert_recorded(model):
    expected = tensors("jointdit_tiny.base")
    loaded = model.state_dict()
    assert loaded.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(loaded[name].float(), tensor), name


def test_one_original_file(base):
    model = load_flux(base)
    assert_recorded(model)
    assert model.config == tiny_config()
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert {parameter.dtype for parameter in load_flux(base, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}


def test_a_prefix_is_taken_off(base):
    save_file({f"model.diffusion_model.{name}": tensor for name, tensor in stored().items()}, base)
    assert_recorded(load_flux(base))


@pytest.mark.parametrize("inner", ["", "transformer"])
def test_a_diffusers_folder_with_shards(tmp_path, inner):
    theirs = transformer_tensors(stored(), width=64)
    save_shards(tmp_path / "F" / inner, theirs, config=DIFFUSERS_FLUX, stem="diffusion_pytorch_model")
    model = load_flux(tmp_path / "F")
    assert_recorded(model)
    assert model.config == tiny_config()


def test_a_missing_shard_is_named(tmp_path):
    theirs = transformer_tensors(stored(), width=64)
    save_shards(tmp_path / "F", theirs, config=DIFFUSERS_FLUX, stem="model")
    (tmp_path / "F" / "model-00002-of-00002.safetensors").unlink()
    refused(tmp_path / "F", "model.safetensors.index.json names model-00002-of-00002.safetensors, which isn't there")


def test_an_unknown_tensor_of_a_diffusers_folder_is_refused(tmp_path):
    theirs = transformer_tensors(stored(), width=64) | {"pos_embed.proj.weight": torch.zeros(1)}
    save_shards(tmp_path / "F", theirs, config=DIFFUSERS_FLUX, stem="model")
    refused(tmp_path / "F", "has the unknown pos_embed.proj.weight (1 tensors)")


def test_half_a_projection_of_a_diffusers_folder_is_refused(tmp_path):
    theirs = transformer_tensors(stored(), width=64)
    del theirs["transformer_blocks.0.attn.to_k.weight"]
    save_shards(tmp_path / "F", theirs, config=DIFFUSERS_FLUX, stem="model")
    refused(tmp_path / "F", "lacks transformer_blocks.0.attn.to_k.weight")


def test_no_guidance_embedding_and_no_bias_are_seen(base):
    left = {
        name: tensor
        for name, tensor in stored().items()
        if not name.startswith("guidance_in.") and not name.endswith("_attn.qkv.bias")
    }
    save_file(left, base)
    config = load_flux(base).config
    assert not config.guidance_embed and not config.qkv_bias


def test_eight_bit_weights_load(base):
    eight_bit = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in stored().items()}
    save_file(eight_bit, base)
    loaded = load_flux(base).state_dict()
    assert all(torch.equal(loaded[name], tensor.float()) for name, tensor in eight_bit.items())


def axes_of(base):
    return load_flux(base).config.axes_dim


def test_rotary_widths_are_told_in_order(base):
    stem, folder = base.with_suffix(".json"), base.parent / "config.json"
    save_file(stored(), base, metadata={"jointdit": json.dumps({"config": {"axes_dim": [8, 12, 12], "theta": 10}})})
    folder.write_text(json.dumps({"axes_dim": [12, 10, 10], "theta": 20}))
    stem.write_text(json.dumps({"axes_dim": [16, 8, 8], "theta": 30}))
    assert (axes_of(base), load_flux(base).config.theta) == ((16, 8, 8), 30)
    stem.unlink()
    assert (axes_of(base), load_flux(base).config.theta) == ((12, 10, 10), 20)
    folder.write_text(json.dumps(DIFFUSERS_FLUX))  # translated as it is read
    assert (axes_of(base), load_flux(base).config.theta) == ((4, 14, 14), 10)
    folder.write_text(json.dumps({"model_type": "t5", "axes_dim": [2, 2, 28]}))  # another model's
    assert axes_of(base) == (8, 12, 12)
    folder.unlink()
    assert axes_of(base) == (8, 12, 12)


def test_rotary_widths_of_known_heads_are_the_variant_tables(tmp_path):
    config = FluxConfig(
        vec_in_dim=8,
        context_in_dim=8,
        hidden_size=64,
        num_heads=1,
        depth=1,
        depth_single_blocks=1,
        axes_dim=(8, 28, 28),
    )
    save_file(Flux(config).state_dict(), tmp_path / "flux1-tiny.safetensors")
    assert load_flux(tmp_path / "flux1-tiny.safetensors").config == config


def refused(path, message, load=load_flux, flag=FLUX_FLAG):
    """Assert an error of one line that begins with the flag and the path."""
    with pytest.raises(UserError, match=re.escape(message)) as error:
        load(path)
    text = str(error.value)
    assert text.startswith(f"{flag} {path}") and "\n" not in text, text
    return text


def test_unknown_rotary_widths_are_refused(base):
    base.with_suffix(".json").unlink()
    refused(base, "heads of width 32 need axes_dim of that sum; say them in base.json")


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"num_heads": 4}, "its configuration says num_heads = 4, its tensors 2; mend the JSON"),
        ({"guidance_embed": False}, "its configuration says guidance_embed = False, its tensors True"),
        ({"axes_dim": [16, 56, 56]}, "heads of width 32 need axes_dim of that sum"),
        ({"axes_dim": [3, 15, 14]}, "even widths that sum to the head width 32 are needed"),
    ],
)
def test_a_configuration_that_contradicts_the_tensors_is_refused(base, stated, message):
    base.with_suffix(".json").write_text(json.dumps({"axes_dim": [4, 14, 14]} | stated))
    refused(base, message)


def test_a_contradicting_diffusers_configuration_is_refused(tmp_path):
    theirs = transformer_tensors(stored(), width=64)
    save_shards(tmp_path / "F", theirs, config=DIFFUSERS_FLUX | {"num_layers": 19}, stem="model")
    refused(tmp_path / "F", "its configuration says depth = 19, its tensors 2")


def test_unreadable_json_is_refused(base):
    base.with_suffix(".json").write_text("{axes")
    with pytest.raises(UserError, match=rf"{FLUX_FLAG} .*base\.json: not readable as JSON"):
        load_flux(base)


def test_missing_tensors_are_named(base):
    left = stored()
    del left["single_blocks.1.linear2.bias"], left["final_layer.linear.weight"]
    save_file(left, base)
    refused(base, "lacks final_layer.linear.weight, single_blocks.1.linear2.bias (2 tensors)")


def test_unknown_tensors_are_named(base):
    save_file(stored() | {"distilled_guidance_layer.in_proj.weight": torch.zeros(2, 2)}, base)
    refused(base, "has the unknown distilled_guidance_layer.in_proj.weight (1 tensors)")


def test_wrong_shapes_are_named(base):
    save_file(stored() | {"double_blocks.1.img_mod.lin.bias": torch.zeros(5)}, base)
    refused(base, "double_blocks.1.img_mod.lin.bias is (5,), expected (384,)")


def test_missing_files_are_named(tmp_path):
    refused(tmp_path / "none.safetensors", "no such file or folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no safetensors file in this folder")


@pytest.mark.parametrize("content", [b"", b"no weights at all, just a few words", bytes(64)])
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "flux1-dev.safetensors"
    path.write_bytes(content)
    refused(path, "not a readable safetensors file")


def test_a_wrong_checkpoint_for_a_flag_is_refused(base):
    autoencoder = GOLDENS / "ae_tiny.weights_f8.safetensors"
    refused(autoencoder, "no tensor img_in.weight, so this isn't what this flag wants (it holds decoder.conv_in.bias")
    refused(GOLDENS / "jointdit_tiny.addons.safetensors", "no tensor img_in.weight")
    refused(base, "no tensor encoder.conv_in.weight, so this isn't", load=load_autoencoder, flag="--ae")


def autoencoder_params():
    params = facts("ae_tiny")["params"]
    return params | {"ch_mult": tuple(params["ch_mult"])}


@pytest.fixture
def autoencoder_file(tmp_path):
    path = tmp_path / "ae.safetensors"
    shutil.copy(GOLDENS / "ae_tiny.weights_f8.safetensors", path)
    return path


def assert_recorded_autoencoder(model):
    expected = tensors("ae_tiny.weights_f8")
    loaded = model.state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())


def test_an_original_autoencoder(autoencoder_file):
    model = load_autoencoder(autoencoder_file)
    assert_recorded_autoencoder(model)
    known = autoencoder_params()
    assert model.config == AutoencoderConfig(**known | {"resolution": 256})
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())


def test_what_an_autoencoders_shapes_cannot_tell(autoencoder_file):
    beside = autoencoder_file.with_suffix(".json")
    beside.write_text(json.dumps({"num_groups": 8, "scale_factor": 0.5, "shift_factor": 0.25, "ch_mult": [1, 2, 4, 4]}))
    config = load_autoencoder(autoencoder_file).config
    assert (config.num_groups, config.scale_factor, config.shift_factor) == (8, 0.5, 0.25)
    beside.write_text(json.dumps({"num_groups": 7}))
    refused(autoencoder_file, "7 groups don't divide its widths; say num_groups in ae.json", load_autoencoder, "--ae")
    beside.write_text(json.dumps({"ch_mult": [1, 2]}))
    refused(
        autoencoder_file, "its configuration says ch_mult = [1, 2], its tensors (1, 2, 4, 4)", load_autoencoder, "--ae"
    )


@pytest.mark.parametrize("inner", ["", "vae"])
def test_a_diffusers_autoencoder(tmp_path, inner):
    config = {
        "_class_name": "AutoencoderKL",
        "scaling_factor": 0.5,
        "shift_factor": 0.25,
        "norm_num_groups": autoencoder_params().get("num_groups", 32),
        "latent_channels": 16,
        "block_out_channels": [32, 64, 128, 128],
    }
    original = tensors("ae_tiny.weights_f8")
    theirs = autoencoder_tensors(original, levels=4)
    save_shards(tmp_path / "F" / inner, theirs, config=config, stem="diffusion_pytorch_model")
    model = load_autoencoder(tmp_path / "F")
    assert_recorded_autoencoder(model)
    assert (model.config.scale_factor, model.config.shift_factor) == (0.5, 0.25)


def test_autoencoder_tensors_are_checked(autoencoder_file):
    left = load_file(autoencoder_file)
    del left["decoder.mid.attn_1.q.weight"]
    save_file(left, autoencoder_file)
    refused(autoencoder_file, "lacks decoder.mid.attn_1.q.weight (1 tensors)", load_autoencoder, "--ae")
    save_file(tensors("ae_tiny.weights_f8") | {"loss.logvar": torch.zeros(1)}, autoencoder_file)
    refused(autoencoder_file, "has the unknown loss.logvar (1 tensors)", load_autoencoder, "--ae")


def test_variants_are_found_by_their_sizes():
    assert variant_of(FluxConfig()).name == "dev"
    assert variant_of(FluxConfig(), path="models/flux1-krea-dev.safetensors").name == "krea-dev"
    assert variant_of(FluxConfig(guidance_embed=False)).name == "schnell"
    assert variant_of(VARIANTS["tiny"].flux).name == "tiny"


def test_full_size_names_and_shapes():
    published = facts("fullsize_keys")
    with torch.device("meta"):
        model = JointDiT(VARIANTS["dev"].flux, ranks=LoraRanks())
    added = set(model.trainable_names())
    shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    assert shapes.keys() == model.state_dict().keys()
    parts = {"addon": added, "base": shapes.keys() - added}
    for part, names in parts.items():
        expected = {}
        for pattern, entry in published[f"{part}_patterns"].items():
            counted = [pattern.replace("{i}", str(index)) for index in range(entry["count"])]
            expected |= dict.fromkeys(counted, entry["shape"])
        assert {name: shapes[name] for name in names} == expected
        assert len(names) == published[f"{part}_tensors"]
        assert sum(model.get_parameter(name).numel() for name in names) == published[f"{part}_params"]
    assert (published["base_tensors"], published["base_params"]) == (780, 11_901_408_320)
    assert (published["addon_tensors"], published["addon_params"]) == (500, 2_354_403_328)
