"""Weight by weight: the same result as all at once, float32 inside bfloat16 steps, exact resuming."""

from functools import partial

import pytest
import torch
from torch import nn

from library.fused_backward import WeightByWeight, steps_each_alone
from library.optim import make_optimizer
from library.randomness import generator_for

RELEASED = ("relative_step=False", "scale_parameter=False", "warmup_init=False")
KINDS = [("adamw", ()), ("adafactor", RELEASED), ("sgd", ("momentum=0.9",)), ("muon", ())]
CPU = torch.device("cpu")


class Net(nn.Module):
    """Uses one weight twice, so that its gradient comes in two parts."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 3)
        generator = generator_for("net")
        for weight in self.parameters():
            weight.data = torch.randn(weight.shape, generator=generator).to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(torch.tanh(self.first(x))))).float().square().mean()


def train(
    net: Net, stepper: WeightByWeight | torch.optim.Optimizer, start: int = 0, stop: int = 5, seen: list | None = None
) -> dict[str, torch.Tensor]:
    for number in range(start, stop):
        x = torch.randn(8, 6, generator=generator_for("x", number)).to(next(net.parameters()).dtype)
        if isinstance(stepper, WeightByWeight):
            stepper.number = number
        net(x).backward()
        if seen is not None:
            seen.append([weight.grad for weight in net.parameters()])
        stepper.step()
        net.zero_grad()
    return {name: weight.detach().clone() for name, weight in net.named_parameters()}


def by_weight(net: Net, kind: str, arguments: tuple[str, ...] = (), *, in_backward: bool) -> WeightByWeight:
    optimizer = make_optimizer(kind, net.parameters(), learning_rate=1e-2, arguments=arguments)
    return WeightByWeight(optimizer, dict(net.named_parameters()), seed=3, in_backward=in_backward)


@pytest.mark.parametrize(("kind", "arguments"), KINDS)
def test_a_fused_backward_pass_gives_the_ordinary_result(kind, arguments):
    plain = Net()
    expected = train(plain, make_optimizer(kind, plain.parameters(), learning_rate=1e-2, arguments=arguments))
    fused = Net()
    seen: list = []
    result = train(fused, by_weight(fused, kind, arguments, in_backward=True), seen=seen)
    assert all(torch.equal(result[name], expected[name]) for name in expected)
    assert all(gradient is None for gradients in seen for gradient in gradients)


@pytest.mark.parametrize(("kind", "arguments"), KINDS)
def test_bfloat16_weights_are_stepped_in_float32_and_alike_in_any_order(kind, arguments):
    one, other = Net(torch.bfloat16), Net(torch.bfloat16)
    in_backward = by_weight(one, kind, arguments, in_backward=True)
    afterwards = by_weight(other, kind, arguments, in_backward=False)
    first, second = train(one, in_backward), train(other, afterwards)
    assert all(torch.equal(first[name], second[name]) and first[name].dtype == torch.bfloat16 for name in first)
    state = [value for entries in afterwards.optimizer.state.values() for value in entries.values()]
    assert all(value.dtype == torch.float32 for value in state if isinstance(value, torch.Tensor))


def test_small_steps_arrive_on_average():
    net = Net(torch.bfloat16)
    weights = {"w": nn.Parameter(torch.ones(20_000, dtype=torch.bfloat16))}
    optimizer = make_optimizer("sgd", weights.values(), learning_rate=1e-4)
    stepper = WeightByWeight(optimizer, weights, seed=0, in_backward=False)
    for stepper.number in range(20):
        weights["w"].grad = torch.ones_like(weights["w"])
        stepper.step()
    # Steps of 1e-4 from 1, where neighbours are 2^-8 and 2^-7 away: to the nearest, nothing would ever move.
    assert weights["w"].float().mean().item() == pytest.approx(1 - 20e-4, abs=1e-4)
    assert next(net.parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize(("kind", "arguments"), KINDS)
def test_resuming_is_exact(kind, arguments):
    whole = Net(torch.bfloat16)
    expected = train(whole, by_weight(whole, kind, arguments, in_backward=True))
    first = Net(torch.bfloat16)
    stopped = by_weight(first, kind, arguments, in_backward=True)
    train(first, stopped, stop=3)
    second = Net(torch.bfloat16)
    second.load_state_dict(first.state_dict())
    resumed = by_weight(second, kind, arguments, in_backward=True)
    resumed.load_state_dict(stopped.state_dict())
    assert all(weight.dtype == torch.bfloat16 and weight.numel() for weight in second.parameters())
    result = train(second, resumed, start=3)
    assert all(torch.equal(result[name], expected[name]) for name in expected)


@pytest.mark.parametrize(("kind", "alone"), [("adamw", True), ("muon", True), ("torch.optim.Adagrad", True)])
def test_optimizers_that_step_each_weight_alone(kind, alone):
    assert steps_each_alone(partial(make_optimizer, kind, learning_rate=1e-2), device=CPU) == alone


@pytest.mark.parametrize(
    ("kind", "module"), [("prodigy", "prodigyopt"), ("adamwschedulefree", "schedulefree")], ids=lambda value: value
)
def test_optimizers_that_step_all_weights_together(kind, module):
    pytest.importorskip(module)
    assert not steps_each_alone(partial(make_optimizer, kind, learning_rate=1e-2), device=CPU)
