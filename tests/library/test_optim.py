"""Optimizers and schedules by name."""

import pytest
import torch
from torch import nn

from library.errors import UserError
from library.optim import make_optimizer, make_scheduler, parse_arguments

RELEASED = ("relative_step=False", "scale_parameter=False", "warmup_init=False")


def parameters():
    return [nn.Parameter(torch.ones(3, 2))]


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("adamw", ("betas=(0.9, 0.95)",)), ("AdamW", ()), ("adafactor", RELEASED), ("torch.optim.SGD", ("momentum=0.9",))],
)
def test_optimizers_step(name, arguments):
    (weight,) = parameters()
    optimizer = make_optimizer(name, [weight], learning_rate=0.1, arguments=arguments)
    weight.sum().backward()
    optimizer.step()
    assert (weight < 1).all()


def test_arguments_are_literals():
    parsed = parse_arguments(("a=False", "b=1e-3", "c=(1, 2)", "d=word"), flag="--optimizer_args")
    assert parsed == {"a": False, "b": 1e-3, "c": (1, 2), "d": "word"}


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("nonsense", (), "--optimizer_type nonsense: unknown; choose one of adamw"),
        ("torch.optim.Nonsense", (), "--optimizer_type torch.optim.Nonsense: .* can't be imported"),
        ("adamw", ("x=1",), "--optimizer_args x=1: adamw refused them"),
        ("adamw", ("x",), "--optimizer_args x: not of the form key=value"),
    ],
)
def test_mistakes_are_named(name, arguments, message):
    with pytest.raises(UserError, match=message):
        make_optimizer(name, parameters(), learning_rate=0.1, arguments=arguments)


def test_schedules():
    optimizer = make_optimizer("adamw", parameters(), learning_rate=1.0)
    scheduler = make_scheduler("constant_with_warmup", optimizer, warmup_steps=4, total_steps=10)
    rates = []
    for _ in range(6):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    with pytest.raises(UserError, match="--lr_scheduler sawtooth: unknown"):
        make_scheduler("sawtooth", optimizer, warmup_steps=0, total_steps=1)
