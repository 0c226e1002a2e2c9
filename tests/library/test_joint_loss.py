"""The training step against recorded numbers of the released code, and what the random part is made of."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from library.batches import Batch, drop_text
from library.flux.latents import unpack
from library.flux.text import TextFeatures
from library.flux.variants import FluxConfig
from library.joint_loss import NoiseSettings, draw, joint_flow_loss, noisy_pairs
from library.jointdit.addons import freeze_backbone, trainable_parameters
from library.jointdit.model import JointDiT, LoraRanks

GOLDENS = Path(__file__).parents[1] / "goldens"
SETTINGS = NoiseSettings(seed=5, shift=3.1582, clean_shift=0.25)


@pytest.fixture(scope="module")
def model():
    config = json.loads((GOLDENS / "jointdit_tiny.json").read_text())["flux_params"]
    ranks = LoraRanks(blocks=8, vector_in=16, vector_out=32, text_in=32)
    model = JointDiT(FluxConfig(**config | {"axes_dim": tuple(config["axes_dim"])}), ranks=ranks)
    weights = {}
    for part in ("base", "addons"):
        weights |= load_file(GOLDENS / f"jointdit_tiny.{part}.safetensors")
    model.load_state_dict({name: weight.float() for name, weight in weights.items()})
    return freeze_backbone(model)


@pytest.fixture(scope="module")
def golden():
    tensors = load_file(GOLDENS / "training_step.safetensors")
    return tensors | {"facts": json.loads((GOLDENS / "training_step.json").read_text())}


def halves(tensor):
    return tensor.unflatten(0, (2, -1))


def test_the_golden_training_step(model, golden):
    text = TextFeatures(tokens_BLD=golden["txt"][:4], pooled_BD=golden["y"][:4])
    batch = Batch(rgb_BChw=golden["rgb_latents"], depth_BChw=golden["depth_latents"], text=text, names=("",) * 4)
    noisy = noisy_pairs(batch, noise_MBChw=halves(golden["noise"]), t_MB=halves(golden["timesteps"]) / 1000)
    torch.testing.assert_close(noisy.x_MBLD, halves(golden["packed_noisy_latents"]), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        unpack(noisy.target_MBLD, height=4, width=6), halves(golden["target"]), atol=1e-5, rtol=0
    )

    v_MBLD = model(
        noisy.x_MBLD, t_MB=noisy.t_MB, text=text, image_ids=noisy.image_ids, guidance_B=golden["guidance"][:4]
    )
    torch.testing.assert_close(unpack(v_MBLD, height=4, width=6), halves(golden["model_pred"]), atol=1e-4, rtol=0)

    loss = joint_flow_loss(model, noisy, text=text, guidance=1.0)
    assert loss.item() == pytest.approx(golden["loss"].item(), abs=1e-4)
    loss.backward()
    norms = {name: parameter.grad.norm().item() for name, parameter in trainable_parameters(model)}
    model.zero_grad()
    assert norms == pytest.approx(golden["facts"]["addon_grad_l2_norms"], rel=1e-3)


def test_draws_do_not_depend_on_the_split():
    whole = draw(SETTINGS, step=7, indices=range(6), shape=(16, 4, 4))
    part = draw(SETTINGS, step=7, indices=range(2, 4), shape=(16, 4, 4))
    assert torch.equal(whole.noise_MBChw[:, 2:4], part.noise_MBChw)
    assert torch.equal(whole.t_MB[:, 2:4], part.t_MB)
    assert torch.equal(whole.drop_B[2:4], part.drop_B)
    for other in (draw(SETTINGS, step=8, indices=range(6), shape=(16, 4, 4)),):
        assert not torch.equal(whole.noise_MBChw, other.noise_MBChw)


def test_noise_is_standard_normal_and_fresh():
    noise = draw(SETTINGS, step=0, indices=range(64), shape=(16, 8, 8)).noise_MBChw
    assert noise.shape == (2, 64, 16, 8, 8)
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01
    assert abs((noise[0] * noise[1]).mean()) < 0.01
    assert abs((noise[:, 0] * noise[:, 1]).mean()) < 0.1


def test_share_of_dropped_text():
    drops = torch.cat([draw(SETTINGS, step=step, indices=range(100), shape=(1, 1, 1)).drop_B for step in range(40)])
    assert 0.085 < drops.float().mean() < 0.115  # 0.1, three standard deviations


def test_dropped_text_is_that_of_the_empty_prompt():
    text = TextFeatures(
        tokens_BLD=torch.randn(3, 5, 4), pooled_BD=torch.randn(3, 6), mask_BL=torch.ones(3, 5, dtype=torch.bool)
    )
    empty = TextFeatures(
        tokens_BLD=torch.randn(1, 5, 4), pooled_BD=torch.randn(1, 6), mask_BL=torch.zeros(1, 5, dtype=torch.bool)
    )
    mixed = drop_text(text, empty=empty, drop_B=torch.tensor([False, True, False]))
    assert torch.equal(mixed.tokens_BLD[1], empty.tokens_BLD[0]) and torch.equal(mixed.pooled_BD[1], empty.pooled_BD[0])
    assert torch.equal(mixed.tokens_BLD[::2], text.tokens_BLD[::2])
    assert mixed.mask_BL.tolist() == [[True] * 5, [False] * 5, [True] * 5]
    assert drop_text(text, empty=empty, drop_B=torch.zeros(3, dtype=torch.bool)) is text
