"""What the timed stages of the embedded model's training share: the loop up to a budget, and the optimizers' state."""

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor


class TrainingStage(ABC):
    """A training up to so many minutes or steps; `step` and `seconds` are how far it is."""

    def __init__(self, *, minutes: float | None, steps: int | None = None) -> None:
        self.minutes, self.steps = minutes, steps
        self.step, self.seconds = 0, 0.0

    @property
    def progress(self) -> float:
        """Share of the budget that is used, 0 to 1."""
        used = self.step / self.steps if self.steps else self.seconds / max(60 * (self.minutes or 0.0), 1e-9)
        return min(1.0, used)

    def run(self) -> Iterator[Tensor]:
        """Train to the end of the budget; yield the loss after every step."""
        while self.progress < 1:
            start = time.monotonic()
            loss = self._update()
            self.seconds += time.monotonic() - start
            self.step += 1
            yield loss

    @abstractmethod
    def _update(self) -> Tensor:
        """Take one optimizer step and return the loss, without its graph."""


def optimizer_tensors(optimizers: Mapping[str, torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Return the state of optimizers by name, each tensor as NAME.PARAMETER.KEY."""
    return {
        f"{name}.{index}.{key}": value
        for name, optimizer in optimizers.items()
        for index, state in optimizer.state_dict()["state"].items()
        for key, value in state.items()
    }


def load_optimizers(optimizers: Mapping[str, torch.optim.Optimizer], tensors: Mapping[str, Tensor]) -> None:
    """Give optimizers back the state of `optimizer_tensors`; other tensors are passed over."""
    for name, optimizer in optimizers.items():
        state: dict[int, dict[str, Tensor]] = {}
        for path, value in tensors.items():
            owner, *rest = path.split(".")
            if owner == name:
                state.setdefault(int(rest[0]), {})[rest[1]] = value
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
