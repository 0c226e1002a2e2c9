"""Which sample is seen when: a pure function of (seed, epoch) and the position in one endless stream.

The stream is epoch after epoch, each a permutation of the samples. Optimizer step s consumes the stream's positions
[s G, (s + 1) G), G being the global batch; within it, micro-batch `part` of process `rank` takes its own run. So every
sample is seen once an epoch, a batch may cross the end of an epoch and may be larger than the dataset, two processes
see what one process with accumulation 2 sees, and resuming needs nothing but the step.

Samples of several sizes lie in buckets, one a size. Each bucket has such a stream of its own, cut into micro-batches;
epoch e deals the micro-batches ceil(n e / b) to ceil(n (e + 1) / b) of a bucket of n samples, b a batch, in an order
drawn for that epoch. With one bucket that is the plain stream.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from library.randomness import generator_for


class Pick(NamedTuple):
    """A sample of the dataset, and the place it is seen at: its optimizer step and its place in the global batch."""

    sample: int
    step: int
    place: int


def sample_order(count: int, *, seed: int, epoch: int, bucket: int = 0) -> Tensor:
    """Permutation of range(count) for one epoch of one bucket, int64."""
    return torch.randperm(count, generator=generator_for(seed, "order", epoch, *([bucket] if bucket else [])))


@dataclass(frozen=True, kw_only=True, slots=True)
class DataOrder:
    """How `count` samples are dealt to steps, processes and micro-batches of `batch_size`.

    `buckets` says which bucket, from 0, each sample is in; None puts all into one.
    """

    count: int
    batch_size: int
    accumulation: int = 1
    processes: int = 1
    rank: int = 0
    seed: int = 0
    buckets: Tensor | None = field(default=None, compare=False)
    bucket_sizes: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        sizes = [self.count] if self.buckets is None else torch.bincount(self.buckets).tolist()
        object.__setattr__(self, "bucket_sizes", tuple(sizes))

    @property
    def global_batch(self) -> int:
        """Samples of one optimizer step, G."""
        return self.batch_size * self.batches_per_step

    @property
    def batches_per_step(self) -> int:
        """Micro-batches of one optimizer step, over all processes."""
        return self.accumulation * self.processes

    def batches_before(self, epoch: int) -> list[int]:
        """How many micro-batches of each bucket are dealt before `epoch`; the last one reaches into that epoch."""
        return [-(-size * epoch // self.batch_size) for size in self.bucket_sizes]

    def epoch_of(self, number: int) -> int:
        """Epoch that deals the micro-batch `number`, counted over all processes from 0."""
        epoch = number * self.batch_size // self.count
        while sum(self.batches_before(epoch)) > number:
            epoch -= 1
        return epoch

    def steps_for(self, epochs: int) -> int:
        """Optimizer steps that see every sample `epochs` times; the last batch goes on into the next epoch."""
        return -(-sum(self.batches_before(epochs)) // self.batches_per_step)

    def epoch_at(self, step: int) -> int:
        """Epochs completed when `step` optimizer steps are done."""
        return self.epoch_of(step * self.batches_per_step)

    def indices(self, part: int) -> range:
        """Indices in the global batch, [0, G), of this process's micro-batch `part`."""
        start = (part * self.processes + self.rank) * self.batch_size
        return range(start, start + self.batch_size)


class _Dealer:
    """Samples of any micro-batch; remembers the epoch's plan and each bucket's permutation from call to call."""

    def __init__(self, order: DataOrder) -> None:
        self.order = order
        buckets = order.buckets
        self.members = [
            torch.arange(order.count) if buckets is None else (buckets == bucket).nonzero()[:, 0]
            for bucket in range(len(order.bucket_sizes))
        ]
        self.shuffled: list[tuple[int, Tensor]] = [(-1, members) for members in self.members]
        self.epoch = -1
        self.first = 0
        self.plan: list[tuple[int, int]] = []

    def batch(self, number: int) -> list[int]:
        """Dataset indices of the micro-batch `number`."""
        epoch = self.order.epoch_of(number)
        if epoch != self.epoch:
            self.epoch, self.first, self.plan = epoch, sum(self.order.batches_before(epoch)), self.plan_of(epoch)
        bucket, batch = self.plan[number - self.first]
        size = self.order.batch_size
        return [self.sample(bucket, position) for position in range(batch * size, (batch + 1) * size)]

    def plan_of(self, epoch: int) -> list[tuple[int, int]]:
        """The epoch's micro-batches in their order, as (bucket, number within the bucket)."""
        following = self.order.batches_before(epoch)
        last = self.order.batches_before(epoch + 1)
        kinds = torch.tensor([bucket for bucket in range(len(last)) for _ in range(following[bucket], last[bucket])])
        plan = []
        for bucket in kinds[torch.randperm(len(kinds), generator=generator_for(self.order.seed, "buckets", epoch))]:
            plan.append((int(bucket), following[int(bucket)]))
            following[int(bucket)] += 1
        return plan

    def sample(self, bucket: int, position: int) -> int:
        """Dataset index at a position of a bucket's stream."""
        members = self.members[bucket]
        epoch, offset = divmod(position, len(members))
        if epoch != self.shuffled[bucket][0]:
            permutation = sample_order(len(members), seed=self.order.seed, epoch=epoch, bucket=bucket)
            self.shuffled[bucket] = (epoch, members[permutation])
        return int(self.shuffled[bucket][1][offset])


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatches:
    """Batch sampler for a data loader: what every micro-batch of steps [start, stop) on this process holds."""

    order: DataOrder
    start: int
    stop: int

    def __len__(self) -> int:
        return max(0, self.stop - self.start) * self.order.accumulation

    def __iter__(self) -> Iterator[list[Pick]]:
        order, dealer = self.order, _Dealer(self.order)
        for step in range(self.start, self.stop):
            for part in range(order.accumulation):
                number = (step * order.accumulation + part) * order.processes + order.rank
                yield [
                    Pick(sample, step, place)
                    for sample, place in zip(dealer.batch(number), order.indices(part), strict=True)
                ]
