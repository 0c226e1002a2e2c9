"""Steps of the optimizer weight by weight: within the backward pass, and into bfloat16 weights.

With `--fused_backward_pass` a weight is stepped as soon as its gradient is whole, and the gradient is freed: no two
gradients need memory at once. With `--addons_precision bf16` a weight is widened to float32 for the time of its own
step and rounded back stochastically, so that the optimizer computes, and keeps its state, in float32.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from library.randomness import generator_for
from library.rounding import round_stochastically


class WeightByWeight:
    """Applies one optimizer to one weight after the other; its state is the optimizer's own.

    Needs an optimizer for which this makes no difference (`steps_each_alone`). The random bits of rounding are a
    function of (seed, step, name of the weight): neither the order of the weights nor resuming changes them.

    Attributes:
        number: optimizer steps done before the present one; to be set before each backward pass.
    """

    def __init__(
        self, optimizer: Optimizer, weights: Mapping[str, nn.Parameter], *, seed: int, in_backward: bool
    ) -> None:
        """Take over `optimizer`; with `in_backward`, backward passes step its weights from now on."""
        self.optimizer = optimizer
        self.weights = weights
        self.names = {weight: name for name, weight in weights.items()}
        self.seed = seed
        self.in_backward = in_backward
        self.number = 0
        if in_backward:
            for weight in weights.values():
                weight.register_post_accumulate_grad_hook(self._step_weight)

    def step(self) -> None:
        """Step every weight that has a gradient still: all of them, or none if the backward pass did."""
        for weight in self.weights.values():
            if weight.grad is not None:
                self._step_weight(weight)

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the optimizer's state as it is: it would be cast to the precision of the weights, which is lower."""
        held = {weight: weight.data for weight in self.weights.values()}
        try:
            for weight in held:
                weight.data = torch.empty(0, dtype=torch.float32, device=weight.device)
            self.optimizer.load_state_dict(state)
        finally:
            for weight, data in held.items():
                weight.data = data

    def _step_weight(self, weight: Tensor) -> None:
        assert isinstance(weight, nn.Parameter)
        with self._alone(weight):
            if weight.dtype == torch.bfloat16:
                self._step_bfloat16(weight)
            else:
                self.optimizer.step()
        weight.grad = None

    def _step_bfloat16(self, weight: nn.Parameter) -> None:
        held, gradient = weight.data, weight.grad
        assert gradient is not None
        generator = generator_for(self.seed, "rounding", self.number, self.names[weight], device=weight.device)
        try:
            weight.grad = None
            weight.data = held.float()
            weight.grad = gradient.float()
            self.optimizer.step()
            held.copy_(round_stochastically(weight.data, generator=generator))
        finally:
            weight.grad = None
            weight.data = held

    @contextmanager
    def _alone(self, weight: nn.Parameter) -> Iterator[None]:
        """Let the optimizer see one weight only."""
        groups = self.optimizer.param_groups
        members = [group["params"] for group in groups]
        try:
            for group, weights in zip(groups, members, strict=True):
                group["params"] = [weight] if any(weight is each for each in weights) else []
            yield
        finally:
            for group, weights in zip(groups, members, strict=True):
                group["params"] = weights


def steps_each_alone(make: Callable[[list[nn.Parameter]], Optimizer], *, device: torch.device) -> bool:
    """Whether an optimizer moves each weight as if it had no other: tried out on two small ones.

    Not so where steps are counted or scaled for all weights together, as schedule-free ones and Prodigy do.
    """
    start = [torch.linspace(-1, 1, 12, device=device).reshape(3, 4), torch.linspace(2, 1, 5, device=device)]
    results = []
    for alone in (False, True):
        weights = {str(number): nn.Parameter(tensor.clone()) for number, tensor in enumerate(start)}
        optimizer = make(list(weights.values()))
        before = _shared_values(optimizer)
        by_weight = WeightByWeight(optimizer, weights, seed=0, in_backward=False)
        for step in range(3):
            for weight in weights.values():
                weight.grad = weight.detach() * (step + 1) + 0.1
            (by_weight if alone else optimizer).step()
        if _shared_values(optimizer) != before:
            return False
        results.append([weight.detach() for weight in weights.values()])
    return all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def _shared_values(optimizer: Optimizer) -> list[dict[str, Any]]:
    """What an optimizer keeps for all weights of a group together."""
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
