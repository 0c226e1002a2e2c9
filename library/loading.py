"""Feeding batches: a data loader over an endless, stateless stream of samples."""

import os
import signal
from collections.abc import Generator
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset

from library.batches import Batch, PixelBatch
from library.data_order import MicroBatches
from library.errors import UserError


class Pairs(Protocol):
    """A map-style set of training pairs."""

    @property
    def names(self) -> list[str]:
        """Names of all samples, in a fixed order."""
        ...

    def read(self, index: int) -> Any:
        """Read one sample; raises `UserError` naming what is missing or damaged."""
        ...

    def collate(self, samples: list[Any]) -> Batch | PixelBatch:
        """Make one batch of samples."""
        ...


class _Safe(Dataset):
    """Carries a `UserError` out of a worker process as a value: raised there, it would come back as a traceback."""

    def __init__(self, pairs: Pairs) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs.names)

    def __getitems__(self, indices: list[int]) -> list[Any]:
        try:
            return [self.pairs.collate([self.pairs.read(index) for index in indices])]
        except UserError as error:
            return [error]


def _only(items: list[Any]) -> Any:
    return items[0]


def _leave_signals_to_parent(worker: int) -> None:
    """A Ctrl-C reaches the whole process group; the readers go on until the trainer has saved its state."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def worker_count(asked: int) -> int:
    """Reader processes to start: what is asked, but one core stays for the training itself."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(0, min(asked, cores - 1))


def load_batches(
    pairs: Pairs, micro_batches: MicroBatches, *, workers: int, pin: bool
) -> Generator[Batch | PixelBatch, None, None]:
    """Yield the batches of `micro_batches` in order, read ahead by `workers` processes; close it to end them.

    Raises:
        UserError: a sample is missing or damaged.
    """
    loader = DataLoader(
        _Safe(pairs),
        batch_sampler=micro_batches,
        num_workers=workers,
        collate_fn=_only,
        persistent_workers=workers > 0,
        pin_memory=pin,
        worker_init_fn=_leave_signals_to_parent,
        # Nothing here draws from the loader's own random state; a fixed one keeps the global state untouched.
        generator=torch.Generator(),
    )
    batches = iter(loader)
    try:
        for batch in batches:
            if isinstance(batch, UserError):
                raise batch
            yield batch
    finally:
        # Ends the workers now, even while an error's traceback keeps this frame alive.
        del batches, loader
