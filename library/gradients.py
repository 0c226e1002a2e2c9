"""What becomes of gradients between loss and step: by accelerate for one process, whole models, models in parts."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

from library.sharding import whole


class Stateful(Protocol):
    """What has a state like that of an optimizer."""

    def state_dict(self) -> dict[str, Any]:
        """The state, by the numbers of the parameters."""

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        """Take a state."""


class Gradients:
    """Takes, exchanges and clips gradients, and steps.

    `model` is what the loss is to be computed with, and `saved` what has the optimizer's state.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        accelerator: Accelerator,
        optimizer: AcceleratedOptimizer,
        weights: Mapping[str, nn.Parameter],
    ) -> None:
        """Take over a model and an optimizer that accelerate has prepared."""
        self.model = model
        self.accelerator = accelerator
        self.optimizer = optimizer
        self.saved: Stateful = optimizer.optimizer
        self.weights = list(weights.values())

    @contextmanager
    def part(self, *, last: bool) -> Iterator[None]:
        """Context for a micro-batch: processes exchange gradients at the `last` one of a step only."""
        if last:
            yield
        else:
            with self.accelerator.no_sync(self.model):
                yield

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a micro-batch."""
        self.accelerator.backward(loss)

    def clip(self, max_norm: float) -> float:
        """Clip the whole gradient to a norm and return the norm it had."""
        return float(whole(self.accelerator.clip_grad_norm_(self.weights, max_norm)))

    def step(self) -> None:
        """Change the weights."""
        self.optimizer.step()
