"""Feeding batches from an endless, stateless stream of samples, read ahead by threads."""

import logging
import os
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from library.batches import Batch, RawBatch
from library.data_order import MicroBatches, Pick
from library.errors import UserError
from library.randomness import generator_for

log = logging.getLogger(__name__)

BATCHES_AHEAD = 2  # for each reader thread


class BadSample(UserError):
    """One sample is damaged or missing; training may go on without it, up to `--max_bad_samples` of them."""


class Pairs(Protocol):
    """A map-style set of training pairs."""

    @property
    def names(self) -> Sequence[str]:
        """Names of all samples, in a fixed order."""
        ...

    @property
    def buckets(self) -> Tensor | None:
        """Which size each sample has, as a number from 0 (int64); None if all have one."""
        ...

    def read(self, index: int, *, generator: torch.Generator | None = None) -> Any:
        """Read one sample; `generator` draws what varies from time to time, without one the first form is read.

        Raises:
            BadSample: a file of it is damaged or missing.
            UserError: the sample doesn't belong to the set.
        """
        ...

    def collate(self, samples: list[Any]) -> Batch | RawBatch:
        """Make one batch of samples."""
        ...


class _Reader:
    """Reads micro-batches; several threads may do so at once."""

    def __init__(self, pairs: Pairs, *, seed: int, max_bad_samples: int, pin: bool) -> None:
        self.pairs = pairs
        self.seed = seed
        self.max_bad_samples = max_bad_samples
        self.pin = pin

    def batch(self, picks: list[Pick]) -> tuple[Batch | RawBatch, dict[str, str]]:
        """Read a micro-batch; beside it stand the problems of the samples that were replaced, by name."""
        problems: dict[str, str] = {}
        batch = self.pairs.collate([self.read(pick, problems) for pick in picks])
        return batch.pin_memory() if self.pin else batch, problems

    def read(self, pick: Pick, problems: dict[str, str]) -> Any:
        """Read the sample of a pick, or else one of its size that is drawn for this very pick; note what is bad."""
        for sample in self.candidates(pick):
            try:
                return self.pairs.read(sample, generator=generator_for(self.seed, "reading", pick.step, pick.place))
            except BadSample as error:
                problems[self.pairs.names[sample]] = str(error)
                if len(problems) > self.max_bad_samples:
                    raise self.too_many(problems) from None
        raise UserError(f"--max_bad_samples {self.max_bad_samples}: no sample of this size can be read; repair them")

    def candidates(self, pick: Pick) -> Iterator[int]:
        """The sample of a pick, then all of its size in an order that depends on (seed, step, place) alone."""
        yield pick.sample
        buckets = self.pairs.buckets
        alike = (
            torch.arange(len(self.pairs.names))
            if buckets is None
            else (buckets == buckets[pick.sample]).nonzero()[:, 0]
        )
        alike = alike[alike != pick.sample]
        generator = generator_for(self.seed, "substitute", pick.step, pick.place)
        yield from alike[torch.randperm(len(alike), generator=generator)].tolist()

    def too_many(self, problems: dict[str, str]) -> UserError:
        """What to say when more samples are bad than may be."""
        last = list(problems.values())[-1]
        if self.max_bad_samples == 0:
            return UserError(last)
        return UserError(f"--max_bad_samples {self.max_bad_samples}: more are damaged or missing; the last one: {last}")


def worker_count(asked: int) -> int:
    """Reader threads to start: what is asked, but one core stays for the training itself."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(0, min(asked, cores - 1))


def load_batches(
    pairs: Pairs, micro_batches: MicroBatches, *, workers: int, pin: bool, max_bad_samples: int = 0
) -> Generator[Batch | RawBatch, None, None]:
    """Yield the batches of `micro_batches` in order, read ahead by `workers` threads; close it to end them.

    Up to `max_bad_samples` damaged or missing samples are named once each in the log and replaced, whenever they come
    up, by others of their size. The replacement is drawn from (seed, step, place in the global batch): it doesn't
    depend on what was read before or by whom. The bound counts names, in each process by itself.

    Raises:
        UserError: more samples than that are damaged or missing.
    """
    reader = _Reader(pairs, seed=micro_batches.order.seed, max_bad_samples=max_bad_samples, pin=pin)
    known: dict[str, str] = {}
    with closing(_read_ahead(reader, micro_batches, workers=workers)) as batches:
        for batch, problems in batches:
            for name in [name for name in problems if name not in known]:
                # As an error, since processes other than the first are silent below.
                log.error("skipped, and replaced by others: %s", problems[name])
            known |= problems
            if len(known) > max_bad_samples:
                raise reader.too_many(known)
            yield batch


def _read_ahead(
    reader: _Reader, micro_batches: MicroBatches, *, workers: int
) -> Generator[tuple[Batch | RawBatch, dict[str, str]], None, None]:
    """Read in order, some batches ahead.

    By threads: reading, decoding and stacking happen outside of Python's lock, and nothing is copied between processes.
    """
    if workers == 0:
        yield from map(reader.batch, micro_batches)
        return
    start = partial(torch.cuda.set_device, torch.cuda.current_device()) if reader.pin else None
    pool = ThreadPoolExecutor(workers, thread_name_prefix="reader", initializer=start)
    coming: deque[Future[tuple[Batch | RawBatch, dict[str, str]]]] = deque()
    try:
        for picks in micro_batches:
            coming.append(pool.submit(reader.batch, picks))
            if len(coming) > BATCHES_AHEAD * workers:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def readable(pairs: Pairs, *, count: int, max_bad_samples: int = 0) -> list[int]:
    """Return the first `count` samples that are to be read again and again, without those that can't be.

    These are named in the log, up to `max_bad_samples` of them: what is looked at during training is found damaged at
    its start.

    Raises:
        UserError: more samples than that are damaged or missing, or all.
    """
    good: list[int] = []
    bad: list[str] = []
    for index in range(min(count, len(pairs.names))):
        try:
            pairs.read(index)
        except BadSample as error:
            bad.append(str(error))
            if len(bad) > max_bad_samples:
                raise
            log.error("left out: %s", error)
        else:
            good.append(index)
    if not good:
        raise UserError(bad[-1])
    return good


def batches_of(pairs: Pairs, indices: Sequence[int], *, batch_size: int) -> Iterator[list[int]]:
    """Yield samples in groups of one size each, of `batch_size` at most."""
    groups: dict[int, list[int]] = {}
    for index in indices:
        groups.setdefault(int(pairs.buckets[index]) if pairs.buckets is not None else 0, []).append(index)
    for members in groups.values():
        for start in range(0, len(members), batch_size):
            yield members[start : start + batch_size]
