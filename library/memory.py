"""Block swap: some blocks' frozen weights stay in CPU memory and are streamed to the device when their block runs.

A wrapper from outside: the model's code and its parameters' names don't change. The copies are one-way, since frozen
weights never change; parameters that are trained stay on the device. While one swapped block computes, the next one's
weights travel on a second CUDA stream.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

_Slot = tuple[nn.Module, str]


def clamp_swap(requested: int, *, available: int, device: torch.device, flag: str = "--blocks_to_swap") -> int:
    """Return how many blocks to swap: none on a CPU, at most as many as the model has; says so in one line if it
    differs."""
    if requested and device.type != "cuda":
        logger.info("%s %d: 0 used, there is no GPU memory to save on %s", flag, requested, device.type)
        return 0
    if requested > available:
        logger.info("%s %d: %d used, the model has no more blocks", flag, requested, available)
    return min(requested, available)


def place(model: nn.Module, *, blocks: Sequence[nn.Module], device: torch.device, swap: int = 0) -> "BlockSwap | None":
    """Move a model that was loaded on the CPU to `device`, except the frozen weights of `swap` of its `blocks`.

    `blocks` are in the order they run; the swapped ones are spread evenly among them, so that copies hide behind the
    blocks in between. The whole model is never on the device at once. Afterwards `model.to(...)` must not be called.
    Gradient checkpointing is wrapped around blocks after this, never before, so that recomputing streams them again.
    """
    if swap == 0:
        model.to(device)
        return None
    chosen = [blocks[round((number + 0.5) * len(blocks) / swap - 0.5)] for number in range(swap)]
    held = {id(parameter) for block in chosen for parameter in block.parameters() if not parameter.requires_grad}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in held:
                parameter.data = parameter.data.to(device)
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)
    return BlockSwap(chosen, device=device)


class BlockSwap:
    """Streams the frozen weights of `blocks` to `device`, each for the time of its forward pass.

    A copy lives as long as something uses it: in a training step the backward pass of a block keeps its own (use
    gradient checkpointing, which runs the block again, to keep only one at a time). Beside the copy in use there is
    one more at most: that of the swapped block that runs next, which is the one before where blocks are run again.
    """

    def __init__(self, blocks: Sequence[nn.Module], *, device: torch.device) -> None:
        self.device = torch.device(device)
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.slots = [list(_frozen_slots(block)) for block in blocks]
        self.ahead: dict[int, list[Tensor]] = {}
        self.last = -1
        if self.stream is not None:
            for module, name in (slot for slots in self.slots for slot in slots):
                module._parameters[name].data = module._parameters[name].data.pin_memory()  # type: ignore[union-attr]
        for number, block in enumerate(blocks):
            block.forward = self._wrap(number, block.forward)

    def _wrap(self, number: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def swapped_forward(*args: Any, **kwargs: Any) -> Any:
            copies = self._take(number)
            self._fetch_ahead(self._next(number), present=number, copies=copies)
            with _substituted(self.slots[number], copies):
                return forward(*args, **kwargs)

        return swapped_forward

    def _take(self, number: int) -> list[Tensor]:
        """Return the weights of a block on the device: those fetched ahead, or fetched now."""
        copies = self.ahead.pop(number, None)
        if copies is None:
            return self._copy(number)
        if self.stream is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self.stream)
            for copy in copies:
                copy.record_stream(current)  # its memory belongs to the other stream's pool
        return copies

    def _next(self, number: int) -> int:
        """Which block runs after block `number`: with gradients they run up, and down again in the backward pass."""
        last, self.last = self.last, number
        if not torch.is_grad_enabled():
            return (number + 1) % len(self.slots)
        if number > last or number == 0 == last:
            return min(number + 1, len(self.slots) - 1)
        return max(number - 1, 0)

    def _fetch_ahead(self, number: int, *, present: int, copies: list[Tensor]) -> None:
        """Start copying the weights of the block that runs next; at a turn it is the present one, whose are kept."""
        if number in self.ahead or len(self.slots) == 1:
            return
        self.ahead.clear()
        if number == present:
            self.ahead[number] = copies
            return
        with torch.cuda.stream(self.stream):
            self.ahead[number] = self._copy(number)

    def _copy(self, number: int) -> list[Tensor]:
        with torch.no_grad():
            return [
                module._parameters[name].to(self.device, non_blocking=True, copy=True)  # type: ignore[union-attr]
                for module, name in self.slots[number]
            ]


def _frozen_slots(block: nn.Module) -> Iterator[_Slot]:
    for module in block.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                yield module, name


@contextmanager
def _substituted(slots: Sequence[_Slot], copies: Sequence[Tensor]) -> Iterator[None]:
    """Let the modules see `copies` instead of their parameters; autograd then keeps the copies it needs, not more."""
    kept = [module._parameters[name] for module, name in slots]
    try:
        for (module, name), copy in zip(slots, copies, strict=True):
            module._parameters[name] = copy  # type: ignore[assignment]
        yield
    finally:
        for (module, name), parameter in zip(slots, kept, strict=True):
            module._parameters[name] = parameter
