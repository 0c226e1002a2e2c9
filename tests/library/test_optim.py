"""Optimizers and schedules by name."""

import logging
import sys

import pytest
import torch
from torch import nn

from library.errors import UserError
from library.optim import OPTIMIZERS, has_modes, make_optimizer, make_scheduler, parse_arguments, shown
from library.training_state import Progress, load_state, save_state

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


OPTIONAL = {"prodigy": "prodigyopt", "adamwschedulefree": "schedulefree"}
OPTIONAL |= {name: "bitsandbytes" for name in ("adamw8bit", "lion8bit", "pagedadamw8bit")}


def optional(name: str) -> None:
    if name in OPTIONAL:
        pytest.importorskip(OPTIONAL[name])


def progress(name: str) -> Progress:
    generator = torch.Generator().manual_seed(0)
    weights = {
        "big": nn.Parameter(torch.randn(80, 64, generator=generator)),  # bitsandbytes' 8 bits begin at 4,096 values
        "other": nn.Parameter(torch.randn(70, 64, generator=generator)),
        "small": nn.Parameter(torch.randn(5, generator=generator)),
    }
    optimizer = make_optimizer(name, weights.values(), learning_rate=0.1)
    scheduler = make_scheduler("linear", optimizer, warmup_steps=2, total_steps=20)
    return Progress(parameters=weights, average=None, optimizer=optimizer, scheduler=scheduler)


def train(live: Progress, start: int, stop: int) -> None:
    for step in range(start, stop):
        for number, weight in enumerate(live.parameters.values()):
            noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(10 * step + number))
            weight.grad = weight.detach() + 0.1 * noise
        live.optimizer.step()
        live.scheduler.step()


@pytest.mark.filterwarnings("ignore:Paged optimizers")
@pytest.mark.parametrize("name", ["adamw", "muon", *OPTIONAL])
def test_saved_and_resumed_is_uninterrupted(name, tmp_path):
    optional(name)
    whole, first, second = progress(name), progress(name), progress(name)
    train(whole, 0, 8)
    train(first, 0, 4)
    load_state(save_state(tmp_path, first, step=4, recipe={}), second, recipe={})
    train(second, 4, 8)
    assert all(torch.equal(second.parameters[key], whole.parameters[key]) for key in whole.parameters)
    assert not torch.equal(second.parameters["big"], first.parameters["big"])


def test_a_rate_that_prodigy_would_shrink_by_is_warned_of(caplog):
    optional("prodigy")
    with caplog.at_level(logging.WARNING, "library"):
        make_optimizer("prodigy", parameters(), learning_rate=1.0)
        assert not caplog.records
        make_optimizer("Prodigy", parameters(), learning_rate=1e-5)
    assert caplog.records[0].getMessage().startswith("--learning_rate 1e-05: prodigy multiplies")


def test_eight_bits_are_held():
    optional("adamw8bit")
    live = progress("adamw8bit")
    train(live, 0, 1)
    assert live.optimizer.state[live.parameters["big"]]["state1"].dtype == torch.uint8


def test_schedule_free_weights_are_shown_and_put_back():
    optional("adamwschedulefree")
    live = progress("adamwschedulefree")
    train(live, 0, 3)
    before = live.parameters["big"].detach().clone()
    with shown(live.optimizer):
        assert not torch.equal(live.parameters["big"], before)
    assert torch.equal(live.parameters["big"], before)
    train(live, 3, 4)  # it is in its training mode again, or it would refuse
    plain = progress("adamw")
    assert not has_modes(plain.optimizer)
    with shown(plain.optimizer):
        train(plain, 0, 1)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_missing_package_is_named(name, monkeypatch):
    module = OPTIMIZERS[name].rpartition(".")[0]
    package = module.partition(".")[0]
    if package in ("torch", "library", "transformers"):
        return
    for each in (package, module):
        monkeypatch.setitem(sys.modules, each, None)
    with pytest.raises(UserError, match=rf"--optimizer_type {name}: .* can't be imported .*pip install -e '\.\["):
        make_optimizer(name, parameters(), learning_rate=0.1)


def test_arguments_are_literals():
    parsed = parse_arguments(("a=False", "b=1e-3", "c=(1, 2)", "d=word"), flag="--optimizer_args")
    assert parsed == {"a": False, "b": 1e-3, "c": (1, 2), "d": "word"}


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("nonsense", (), "--optimizer_type nonsense: unknown; choose one of adamw"),
        ("torch.optim.Nonsense", (), "--optimizer_type torch.optim.Nonsense: .* can't be imported"),
        ("json.loads", (), "--optimizer_type json.loads: json.loads is no optimizer"),
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


def rates(name: str, *arguments: str, steps: int = 10) -> list[float]:
    optimizer = make_optimizer("adamw", parameters(), learning_rate=1.0)
    scheduler = make_scheduler(name, optimizer, warmup_steps=2, total_steps=steps, arguments=arguments)
    seen = []
    for _ in range(steps + 1):
        seen.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return seen


@pytest.mark.parametrize(
    ("name", "arguments", "last"),
    [
        ("cosine_with_min_lr", ("min_lr_rate=0.1",), 0.1),
        ("warmup_stable_decay", ("num_decay_steps=4", "min_lr_ratio=0.25"), 0.25),
        ("polynomial", ("lr_end=0.3", "power=2"), 0.3),
        ("linear", (), 0.0),
        ("cosine", (), 0.0),
    ],
)
def test_schedules_rise_to_the_rate_and_end_where_told(name, arguments, last):
    seen = rates(name, *arguments)
    assert max(seen) == pytest.approx(1.0)
    assert seen[-1] == pytest.approx(last, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("warmup_stable_decay", (), "--lr_scheduler_args: --lr_scheduler warmup_stable_decay refused .*num_decay"),
        ("cosine", ("x=1",), "--lr_scheduler_args x=1: --lr_scheduler cosine refused"),
        ("constant_with_warmup", ("x=1",), "--lr_scheduler_args x=1: --lr_scheduler constant_with_warmup takes none"),
        ("reduce_lr_on_plateau", (), "--lr_scheduler reduce_lr_on_plateau: unknown"),
    ],
)
def test_mistakes_of_schedules_are_named(name, arguments, message):
    with pytest.raises(UserError, match=message):
        rates(name, *arguments)
