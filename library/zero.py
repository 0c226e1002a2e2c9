"""Gradients and optimizer state in parts on several processes (ZeRO stage 2, Rajbhandari et al., arXiv 1910.02054).

DeepSpeed does it; each process keeps the whole model. States are written and read as those of other runs are: whole
tensors by parameter, which any other number of processes could read too.
"""

import importlib
import logging
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

from library.errors import UserError
from library.gradients import Gradients

FLAG = "--shard_optimizer"


class ZeroGradients(Gradients):
    """Gradients and the state of an optimizer over `weights`, shared out over all processes."""

    def __init__(
        self,
        model: nn.Module,
        *,
        accelerator: Accelerator,
        optimizer: AcceleratedOptimizer,
        weights: Mapping[str, nn.Parameter],
        accumulation: int,
        max_norm: float,
    ) -> None:
        """Take over a model that isn't wrapped for several processes, and an optimizer that hasn't stepped yet.

        `accumulation` micro-batches make a step, and gradients are clipped to `max_norm` (0: not).

        Raises:
            UserError: DeepSpeed isn't installed.
        """
        self.raw_optimizer = optimizer.optimizer
        self.engine, *_ = _deepspeed(accelerator.device).initialize(
            model=model,
            optimizer=self.raw_optimizer,
            model_parameters=list(weights.values()),
            dist_init_required=False,
            config={
                "train_micro_batch_size_per_gpu": 1,  # only for its own messages: it gets no data
                "gradient_accumulation_steps": accumulation,
                "gradient_clipping": max_norm,
                "zero_optimization": {"stage": 2},
                "zero_allow_untested_optimizer": True,  # SGD
            },
        )
        super().__init__(self.engine, accelerator=accelerator, optimizer=optimizer, weights=weights)
        self.saved = self
        self.own: Tensor = self.raw_optimizer.param_groups[0]["params"][0]  # an equal part of the row of all weights
        begin = accelerator.process_index * self.own.numel()
        self.cuts = cut((weight.numel() for weight in self.weights), begin=begin, end=begin + self.own.numel())
        assert torch.equal(self.own, self.part_of(self.weights)), "DeepSpeed lays the weights out in another order"

    @contextmanager
    def part(self, *, last: bool) -> Iterator[None]:
        """Context for a micro-batch: a step is possible after the `last` one."""
        self.engine.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a micro-batch, and leave each process its part of their mean."""
        self.engine.backward(loss, scale_wrt_gas=False)

    def clip(self, max_norm: float) -> float:
        """Return the norm of the whole gradient, which DeepSpeed clips at the step."""
        return float(self.engine.optimizer.scaled_global_norm())

    def step(self) -> None:
        """Clip, step, and put the new weights together on every process."""
        self.engine.step()

    def part_of(self, tensors: Sequence[Tensor]) -> Tensor:
        """This process's part of whole tensors, one for each weight."""
        part = torch.zeros_like(self.own)
        for tensor, (there, here) in zip(tensors, self.cuts, strict=True):
            part[here] = tensor.detach().flatten()[there].to(part)
        return part

    def state_dict(self) -> dict[str, Any]:
        """The state as of an optimizer over whole weights, in CPU memory; all processes must call this together."""
        own = self.raw_optimizer.state[self.own]
        state: dict[int, dict[str, Any]] = {}
        for index in range(len(self.weights)):
            state[index] = {key: self._whole(value, index) for key, value in own.items()}
        groups = [group | {"params": list(range(len(self.weights)))} for group in self.raw_optimizer.param_groups]
        return {"state": {index: entries for index, entries in state.items() if entries}, "param_groups": groups}

    def load_state_dict(self, saved: dict[str, Any], /) -> None:
        """Go on from what `state_dict` gave, with weights that have been put into the model."""
        state = [saved["state"].get(index, {}) for index in range(len(self.weights))]
        self.raw_optimizer.state[self.own] = {
            key: self.part_of([entries[key] for entries in state])
            if isinstance(value, Tensor) and value.shape == self.weights[0].shape
            else value
            for key, value in state[0].items()
        }
        for group, kept in zip(self.raw_optimizer.param_groups, saved["param_groups"], strict=True):
            group.update({key: value for key, value in kept.items() if key != "params"})
        self.engine.optimizer.refresh_fp32_params()

    def _whole(self, value: Any, index: int) -> Any:
        """Put together what belongs to a weight; what isn't in parts is returned as it is."""
        if not isinstance(value, Tensor) or value.shape != self.own.shape:
            return value
        weight, (there, here) = self.weights[index], self.cuts[index]
        row = torch.zeros(weight.numel(), dtype=value.dtype, device=value.device)
        row[there] = value[here]
        torch.distributed.all_reduce(row)
        return row.view(weight.shape).cpu()


def cut(sizes: Iterable[int], *, begin: int, end: int) -> list[tuple[slice, slice]]:
    """Return, for tensors in a row, which of their elements lie between `begin` and `end`, and where there."""
    cuts = []
    place = 0
    for size in sizes:
        low, high = max(place, begin), max(place, begin, min(place + size, end))
        cuts.append((slice(low - place, high - place), slice(low - begin, high - begin)))
        place += size
    return cuts


def _deepspeed(device: torch.device) -> Any:
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        deepspeed = importlib.import_module("deepspeed")
    except ImportError as error:
        raise UserError(f"{FLAG}: DeepSpeed can't be imported ({error}); pip install -e '.[deepspeed]'") from None
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    return deepspeed
