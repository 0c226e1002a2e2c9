"""Gradient checkpointing over a list of blocks, from outside: the model's `forward` doesn't know of it."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def checkpoint_blocks(blocks: nn.ModuleList | list[nn.Module], *, every: int = 1) -> None:
    """Recompute every `every`-th block's activations in the backward pass instead of keeping them.

    Only the blocks' `forward` is replaced, so parameter names and saved files stay the same. Without gradients
    (previews, validation) the blocks run as they are.
    """
    for block in list(blocks)[::every]:
        block.forward = _recomputed(block.forward)


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        # No block draws random numbers, so there is no random state to keep.
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return run
