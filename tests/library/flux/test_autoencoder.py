"""The autoencoder against recorded outputs of the original, and the full size's shapes."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel

from library.flux.autoencoder import Autoencoder
from library.flux.variants import VARIANTS, AutoencoderConfig

GOLDENS = Path(__file__).parents[2] / "goldens"


@pytest.fixture(scope="module")
def cases():
    return load_file(GOLDENS / "ae_tiny.cases.safetensors")


@pytest.fixture(scope="module")
def autoencoder():
    params = json.loads((GOLDENS / "ae_tiny.json").read_text())["params"]
    params["ch_mult"] = tuple(params["ch_mult"])
    model = Autoencoder(AutoencoderConfig(**params)).requires_grad_(False)
    weights = load_file(GOLDENS / "ae_tiny.weights_f8.safetensors")
    model.load_state_dict({name: weight.float() for name, weight in weights.items()})
    return model


def test_moments_are_the_originals(autoencoder, cases):
    mean, log_variance = autoencoder.moments(cases["x"])
    torch.testing.assert_close(torch.cat([mean, log_variance], dim=1), cases["moments"], atol=1e-4, rtol=0)
    torch.testing.assert_close(mean, cases["mean"], atol=1e-4, rtol=0)


def test_latents_are_the_originals(autoencoder, cases):
    latents = autoencoder.encode(cases["x"])
    torch.testing.assert_close(latents, cases["latent_mode"], atol=1e-4, rtol=0)
    torch.testing.assert_close(autoencoder.decode(latents), cases["roundtrip"], atol=1e-4, rtol=0)
    torch.testing.assert_close(autoencoder.decode(cases["z"]), cases["decoded"], atol=1e-4, rtol=0)


def test_a_generator_samples_the_posterior(autoencoder, cases, monkeypatch):
    monkeypatch.setattr(torch, "randn", lambda *_, **__: cases["eps"])
    sample = autoencoder.encode(cases["x"], generator=torch.Generator())
    torch.testing.assert_close(sample, cases["latent_sample"], atol=1e-4, rtol=0)


def test_the_generators_seed_decides(autoencoder, cases):
    first, again, other = (
        autoencoder.encode(cases["x"], generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@torch.no_grad()
def test_attention_takes_memory_by_the_pixels_not_their_square():
    model = Autoencoder(VARIANTS["tiny"].autoencoder)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # no other: it raises where this kernel doesn't take what it gets
        assert model.decode(model.encode(torch.zeros(1, 3, 32, 16))).shape == (1, 3, 32, 16)


def test_full_size_shapes():
    with torch.device("meta"):
        model = Autoencoder(VARIANTS["dev"].autoencoder)
        latents = model.encode(torch.empty(2, 3, 64, 96))
    assert sum(p.numel() for p in model.parameters()) == 83_819_683
    assert len(model.state_dict()) == 244
    assert latents.shape == (2, 16, 8, 12)
    assert model.decode(latents).shape == (2, 3, 64, 96)


def test_one_group_and_one_block_suit_the_embedded_model():
    model = Autoencoder(VARIANTS["tiny"].autoencoder)
    assert model.encoder.norm_out.num_groups == 1
    assert sum(p.numel() for p in model.parameters()) < 1_500_000
    assert model.decode(model.encode(torch.zeros(1, 3, 32, 16))).shape == (1, 3, 32, 16)
