"""Exponential moving average of the trained weights."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


class RunningAverage:
    """float32 averages of named tensors: average += (1 - decay) (value - average) at every step.

    The decay grows to its value as (1 + n) / (10 + n) after n updates, so that the start is forgotten quickly.
    """

    def __init__(self, live: Mapping[str, Tensor], *, decay: float) -> None:
        self.live = live
        self.decay = decay
        self.tensors = {name: tensor.detach().clone().float() for name, tensor in live.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the live values after optimizer step number `step` (from 1)."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        current = [tensor.float() for tensor in self.live.values()]
        torch._foreach_lerp_(list(self.tensors.values()), current, weight)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within the block the live tensors hold the averages."""
        kept = {name: tensor.detach().clone() for name, tensor in self.live.items()}
        _copy(self.live, self.tensors)
        try:
            yield
        finally:
            _copy(self.live, kept)


@torch.no_grad()
def _copy(target: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> None:
    for name, tensor in target.items():
        tensor.copy_(source[name])
