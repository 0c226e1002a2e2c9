"""Add-ons files: the released names, our facts about them, and what is refused."""

import json
import logging
import re
from dataclasses import replace

import pytest
import torch
from golden_files import GOLDENS, RANKS, SIDECAR, assert_near, joint_case, lay_tiny_model, tensors
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from library import load_jointdit
from library.errors import UserError
from library.flux.model import Flux
from library.flux.variants import FluxConfig
from library.jointdit.addons import (
    AddonSettings,
    base_fingerprint,
    new_jointdit,
    read_settings,
    save_addons,
    trainable_parameters,
)

FLAG = "--jointdit_addons_path"


@pytest.fixture
def paths(tmp_path):
    return lay_tiny_model(tmp_path)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    flux, addons = lay_tiny_model(tmp_path_factory.mktemp("tiny"))
    return load_jointdit(flux=flux, addons=addons)


def released():
    return load_file(GOLDENS / "jointdit_tiny.addons.safetensors")


def refused(paths, message):
    """Assert an error of one line that begins with the flag and the file."""
    with pytest.raises(UserError, match=re.escape(message)) as error:
        load_jointdit(flux=paths[0], addons=paths[1])
    text = str(error.value)
    assert text.startswith(f"{FLAG} {paths[1].with_suffix('')}") and "\n" not in text, text


def test_saved_names_and_values_are_the_released_ones(model, tmp_path):
    save_addons(tmp_path / "saved.safetensors", model, settings=AddonSettings())
    saved = load_file(tmp_path / "saved.safetensors")
    assert saved.keys() == released().keys()
    for name, tensor in released().items():
        assert saved[name].dtype == torch.bfloat16
        assert torch.equal(saved[name], tensor), name
    assert json.loads((tmp_path / "saved.json").read_text()) == SIDECAR


def test_equal_addons_give_equal_bytes(model, tmp_path):
    settings = AddonSettings(depth_transform="inverse", base="0123456789abcdef")
    for name in ("one", "two"):
        save_addons(tmp_path / name / "x.safetensors", model, settings=settings, extra={"unbalanced": True})
    for file in ("x.safetensors", "x.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_the_header_holds_one_key(model, tmp_path):
    settings = AddonSettings(weighting="paper", is_attnmask_training=True)
    save_addons(tmp_path / "x.safetensors", model, settings=settings, extra={"unbalanced": False})
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert list(metadata) == ["jointdit"]
    facts = json.loads(metadata["jointdit"])
    assert list(facts) == sorted(facts)
    assert facts["ranks"] == {"blocks": 8, "vector_in": 16, "vector_out": 32, "text_in": 32}
    assert (facts["weighting"], facts["is_attnmask_training"], facts["unbalanced"]) == ("paper", True, False)
    assert "licence of the backbone" in facts["licence"]


def test_loading_gives_what_was_saved(paths):
    generator = torch.Generator().manual_seed(0)
    model = new_jointdit(
        flux=paths[0], ranks=replace(RANKS, blocks=5, text_in=7), weighting="paper", generator=generator
    )
    with torch.no_grad():
        for _, parameter in trainable_parameters(model):
            parameter.copy_((torch.randn(parameter.shape, generator=generator) / 10).bfloat16())
    settings = AddonSettings(weighting="paper", base=base_fingerprint(paths[0]))
    save_addons(paths[1], model, settings=settings)
    loaded = load_jointdit(flux=paths[0], addons=paths[1])
    assert (loaded.ranks, loaded.weighting) == (model.ranks, "paper")
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    assert read_settings(paths[1]) == settings
    case = joint_case("b")
    with torch.no_grad():
        assert torch.equal(loaded(case.x_MBLD, **case.inputs), model(case.x_MBLD, **case.inputs))


def test_addons_may_be_saved_in_full(model, paths):
    save_addons(paths[1], model, settings=AddonSettings(), dtype=torch.float32)
    assert {tensor.dtype for tensor in load_file(paths[1]).values()} == {torch.float32}


def test_ranks_are_read_off_the_tensors(paths, model):
    assert model.ranks == RANKS
    assert load_jointdit(flux=paths[0], addons=paths[1], dtype=torch.bfloat16).ranks == RANKS


def test_the_released_side_car_decides(paths, caplog):
    told = {"is_txt_ids_training": True, "is_attnmask_training": True, "depth_transform": "inverse"}
    paths[1].with_suffix(".json").write_text(json.dumps(told))
    assert read_settings(paths[1]) == AddonSettings(**told)
    assert not caplog.records


def test_neither_side_car_nor_header_is_warned_about(paths, caplog):
    paths[1].with_suffix(".json").unlink()
    with caplog.at_level(logging.WARNING):
        assert read_settings(paths[1]) == AddonSettings()
    assert f"{FLAG} {paths[1]}: no jointdit_addons.json beside it; taking the released settings" in caplog.text


def test_a_header_is_enough(model, tmp_path, caplog):
    settings = AddonSettings(is_txt_ids_training=True, depth_transform="inverse", weighting="none")
    save_addons(tmp_path / "x.safetensors", model, settings=settings)
    (tmp_path / "x.json").unlink()
    assert read_settings(tmp_path / "x.safetensors") == settings
    assert not caplog.records


def test_a_side_car_that_contradicts_the_header_is_refused(model, paths):
    save_addons(paths[1], model, settings=AddonSettings(depth_transform="inverse"))
    paths[1].with_suffix(".json").write_text(json.dumps(SIDECAR))
    refused(paths, "depth_transform is none, the file's header says inverse")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not readable as JSON"),
        ("[1]", "holds a list, not named settings"),
        ('{"depth_transform": "log"}', "depth_transform 'log' is none of none, inverse"),
        ('{"is_txt_ids_training": "no"}', "is_txt_ids_training 'no' is neither true nor false"),
    ],
)
def test_a_wrong_side_car_is_refused(paths, content, message):
    paths[1].with_suffix(".json").write_text(content)
    refused(paths, message)


def test_addons_of_another_width_are_refused(paths, tmp_path):
    config = FluxConfig(
        vec_in_dim=32,
        context_in_dim=48,
        hidden_size=128,
        num_heads=1,
        depth=2,
        depth_single_blocks=3,
        axes_dim=(16, 56, 56),
    )
    save_file(Flux(config).state_dict(), tmp_path / "wide.safetensors")
    wide = tmp_path / "wide.safetensors"
    refused((wide, paths[1]), f"made for a backbone of width 64; --pretrained_model_name_or_path {wide} has 128")


def test_addons_of_another_backbone_of_the_same_sizes_are_refused(model, paths):
    save_addons(paths[1], model, settings=AddonSettings(base=base_fingerprint(paths[0])))
    weights = tensors("jointdit_tiny.base")
    save_file(weights, paths[0])  # float32 instead of bfloat16: the same backbone
    assert_near(
        load_jointdit(flux=paths[0], addons=paths[1]).state_dict()["img_in.weight"], weights["img_in.weight"], within=0
    )
    weights["img_in.weight"][3, 5] += 0.5
    save_file(weights, paths[0])
    refused(
        paths, f"made for another backbone than --pretrained_model_name_or_path {paths[0]}: its fingerprint differs"
    )


def test_addons_for_another_depth_are_refused(paths):
    left = {name: tensor for name, tensor in released().items() if not name.startswith("single_blocks.2.")}
    save_file(left, paths[1])
    refused(paths, "lacks single_blocks.2.joint2.bias, single_blocks.2.joint2.weight, single_blocks.2.linear1.lora_A")
    save_file(released() | {"single_blocks.3.joint2.bias": torch.zeros(128)}, paths[1])
    refused(paths, "has the unknown single_blocks.3.joint2.bias (1 tensors); made for another backbone?")


def test_wrong_shapes_are_named(paths):
    save_file(released() | {"double_blocks.1.img_mod.lin.lora_B.weight": torch.zeros(384, 9)}, paths[1])
    refused(paths, "double_blocks.1.img_mod.lin.lora_B.weight is (384, 9), expected (384, 8)")


def test_a_wrong_checkpoint_for_the_flag_is_refused(paths):
    refused((paths[0], GOLDENS / "ae_tiny.weights_f8.safetensors"), "so this isn't what this flag wants")
    refused((paths[0], paths[0]), "so this isn't what this flag wants")


def test_other_files_are_refused(paths):
    paths[1].write_text("no weights")
    refused(paths, "not a readable safetensors file")
    paths[1].unlink()
    refused(paths, "no such file or folder")


def test_a_backbone_that_lacks_tensors_is_named(paths):
    left = load_file(paths[0])
    del left["single_blocks.1.linear2.bias"]
    save_file(left, paths[0])
    with pytest.raises(UserError, match=r"--pretrained_model_name_or_path .*: lacks single_blocks.1.linear2.bias"):
        load_jointdit(flux=paths[0], addons=paths[1])


@pytest.mark.parametrize("wrong", [{"depth_transform": "log"}, {"weighting": "cosine"}])
def test_unknown_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} '.*' is none of"):
        AddonSettings(**wrong)


def test_ranks_of_nothing_are_refused():
    with pytest.raises(ValueError, match="ranks must be at least 1"):
        replace(RANKS, blocks=0)
