"""Packed frozen weights: how near, how small, the same gradients, and the add-ons left alone."""

import copy
import sys

import pytest
import torch
from tiny_model import FLUX, tiny_model
from torch import nn

from library.errors import UserError
from library.flux.latents import image_ids
from library.flux.text import TextFeatures
from library.jointdit.addons import freeze_backbone
from library.jointdit.lora import LoRALinear
from library.jointdit.model import JointDiT, LoraRanks
from library.memory import place
from library.pipeline import Pipeline
from library.quantize import FORMATS, quantize_base, quantize_linear
from library.randomness import generator_for
from library.weight_paths import WeightPaths

KINDS = ["int8", "fp8", pytest.param("nf4", marks=pytest.mark.filterwarnings("ignore"))]
# Stated bounds: error of normal weights and of a model's velocities, relative in root mean square; bytes a weight.
WEIGHT_ERROR = {"int8": 0.012, "fp8": 0.03, "nf4": 0.1}
OUTPUT_ERROR = {"int8": 0.012, "fp8": 0.045, "nf4": 0.16}
BYTES = {"int8": 1.02, "fp8": 1.02, "nf4": 0.57}


@pytest.fixture(autouse=True)
def skip_without_bitsandbytes(request):
    if "nf4" in request.node.name:
        pytest.importorskip("bitsandbytes")


def model(kind: str | None = None) -> JointDiT:
    built = JointDiT(FLUX, ranks=LoraRanks(blocks=4, vector_in=4, vector_out=4, text_in=4))
    generator = generator_for("model")
    for weight in built.parameters():
        spread = weight.shape[-1] ** -0.5 if weight.dim() > 1 else 0.1
        weight.data = torch.randn(weight.shape, generator=generator) * spread + (weight.dim() == 1)
    freeze_backbone(built)
    quantize_base(built, kind)
    return built


def velocity(built: JointDiT) -> torch.Tensor:
    generator = generator_for("inputs")
    text = TextFeatures(
        tokens_BLD=torch.randn(1, 5, FLUX.context_in_dim, generator=generator),
        pooled_BD=torch.randn(1, FLUX.vec_in_dim, generator=generator),
    )
    x = torch.randn(2, 1, 16, FLUX.in_channels, generator=generator)
    return built(x, t_MB=torch.tensor([[0.3], [0.8]]), text=text, image_ids=image_ids(4, 4))


def relative(error: torch.Tensor, value: torch.Tensor) -> float:
    return (error.norm() / value.norm()).item()


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_near_and_small(kind):
    weight = torch.randn(192, 256, generator=generator_for("weight")) * torch.logspace(-3, 1, 192)[:, None]
    parts = FORMATS[kind].pack(weight)
    unpacked = FORMATS[kind].unpack(parts, weight.shape, torch.float32)
    errors = [relative(unpacked[row] - weight[row], weight[row]) for row in range(len(weight))]
    assert max(errors) < 1.3 * WEIGHT_ERROR[kind] and sum(errors) / len(errors) < WEIGHT_ERROR[kind]
    assert sum(part.nbytes for part in parts) / weight.numel() < BYTES[kind]
    assert FORMATS[kind].unpack(parts, weight.shape, torch.bfloat16).dtype == torch.bfloat16
    zeros = torch.zeros(2, 64)
    assert torch.equal(FORMATS[kind].unpack(FORMATS[kind].pack(zeros), zeros.shape, torch.float32), zeros)


@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_are_those_of_the_unpacked_weight(kind):
    layer = LoRALinear(64, 48, bias=True, rank=4)
    layer.weight.requires_grad_(False)
    packed = copy.deepcopy(layer)
    quantize_linear(packed, kind)
    with torch.no_grad():
        parts = [packed.weight_packed, packed.weight_scales]
        layer.weight.copy_(FORMATS[kind].unpack(parts, layer.weight.shape, torch.float32))
    results = []
    for each in (layer, packed):
        x = torch.randn(2, 3, 64, generator=generator_for("x"), requires_grad=True)
        y = each(x)
        y.square().sum().backward()
        results.append([y.detach(), x.grad, each.lora_A.weight.grad, each.lora_B.weight.grad])
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_only_frozen_linears_of_the_blocks_are_packed(kind):
    plain, packed = model(), model(kind)
    missing = {name for name, _ in plain.named_parameters()} - {name for name, _ in packed.named_parameters()}
    frozen = {
        f"{name}.weight"
        for name, module in plain.named_modules()
        if isinstance(module, nn.Linear) and "blocks" in name and not module.weight.requires_grad
    }
    assert missing == frozen and len(frozen) == 10 + 2 * 3
    assert packed.trainable_names() == plain.trainable_names()
    assert {name for name, weight in packed.named_parameters() if weight.requires_grad} == set(plain.trainable_names())


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_says_nearly_the_same_in_less_memory(kind):
    expected, packed = velocity(model()), model(kind)
    assert relative(velocity(packed) - expected, expected) < OUTPUT_ERROR[kind]
    blocks = [*packed.double_blocks, *packed.single_blocks]
    held = sum(weight.nbytes for block in blocks for name, weight in block.named_parameters() if "weight_" in name)
    whole = sum(model().get_parameter(name).numel() for name in _packed_names(packed))
    assert held / whole < BYTES[kind] + 0.1  # narrow layers have many scales


def _packed_names(packed: JointDiT) -> list[str]:
    return [name.replace("weight_packed", "weight") for name, _ in packed.named_parameters() if "weight_packed" in name]


@pytest.mark.parametrize("kind", KINDS)
def test_block_swap_streams_packed_weights_too(kind):
    expected = velocity(model(kind))
    swapped = model(kind)
    blocks = [*swapped.double_blocks, *swapped.single_blocks]
    place(swapped, blocks=blocks, device=torch.device("cpu"), swap=2)
    assert torch.equal(velocity(swapped), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_decides_the_precision(kind):
    packed = model(kind)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = velocity(packed).float().square().mean()
    loss.backward()
    assert all(weight.grad is not None for weight in packed.parameters() if weight.requires_grad)


def test_inference_holds_a_packed_base_too():
    def depth(kind: str | None) -> torch.Tensor:
        pipeline = Pipeline(WeightPaths(**tiny_model()), base_precision=kind)
        (result,) = pipeline.run("joint_generation", prompt="x", steps=2, size=(32, 32))
        names = {name.rpartition(".")[2] for name, _ in pipeline._loaded_model().named_parameters()}
        assert ("weight_packed" in names) == (kind is not None)
        return result.depth_hw

    error = (depth("int8") - depth(None)).abs().mean()
    assert 0 < error < 0.02


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"nf4: bitsandbytes can't be imported .*pip install -e '\.\[gpu\]'"):
        quantize_linear(nn.Linear(64, 4), "nf4")
