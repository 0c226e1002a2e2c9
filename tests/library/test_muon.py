from copy import deepcopy

import pytest
import torch

from library.muon import Muon, MuonAdam, orthogonalize


@pytest.mark.parametrize("shape", [(3, 8, 20), (2, 20, 8)])
def test_orthogonalized_matrices_have_singular_values_near_one(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalize(matrices))
    assert values.min() > 0.5 and values.max() < 1.3


def test_muon_steps_by_the_rate_whatever_the_gradient():
    weight = torch.nn.Parameter(torch.zeros(4, 3, 3, 3))
    gradient = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    for scale in (1e-3, 1e3):
        weight.data.zero_()
        weight.grad = gradient * scale
        Muon([weight], lr=0.1).step()
        values = torch.linalg.svdvals(weight.flatten(1))
        assert 0.05 < values.min() and values.max() < 0.13


def test_muon_refuses_vectors():
    with pytest.raises(ValueError, match="two or more dimensions"):
        Muon([torch.nn.Parameter(torch.zeros(3))])


def train(optimizers, layer, *, steps):
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    for _ in range(steps):
        layer.zero_grad()
        layer(x).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()


def layers(count):
    torch.manual_seed(0)
    first = torch.nn.Linear(8, 4)
    rest = [torch.nn.Linear(8, 4) for _ in range(count - 1)]
    for layer in rest:
        layer.load_state_dict(first.state_dict())
    return [first, *rest]


def test_muon_adam_is_each_for_its_own_weights():
    one, two = layers(2)
    train([MuonAdam(one.parameters(), lr=0.02, adam_lr=1e-3)], one, steps=3)
    adam = torch.optim.AdamW([two.bias], lr=1e-3, betas=(0.9, 0.99), weight_decay=0)
    train([Muon([two.weight], lr=0.02), adam], two, steps=3)
    assert torch.equal(one.weight, two.weight) and torch.equal(one.bias, two.bias)


def test_muon_adam_goes_on_from_its_state():
    one, two = layers(2)
    optimizer = MuonAdam(one.parameters())
    train([optimizer], one, steps=2)
    saved, weights = deepcopy(optimizer.state_dict()), {name: value.clone() for name, value in one.state_dict().items()}
    train([optimizer], one, steps=2)
    two.load_state_dict(weights)
    resumed = MuonAdam(two.parameters())
    resumed.load_state_dict(saved)
    train([resumed], two, steps=2)
    assert torch.equal(one.weight, two.weight) and torch.equal(one.bias, two.bias)


def test_muon_adam_follows_the_schedule():
    (layer,) = layers(1)
    optimizer = MuonAdam(layer.parameters())
    before = layer.weight.clone()
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    train([optimizer], layer, steps=1)
    assert torch.equal(layer.weight, before)
