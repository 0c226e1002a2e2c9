"""Which sample is seen when: a pure function of (seed, epoch) and the position in one endless stream.

The stream is epoch after epoch, each a permutation of the samples. Optimizer step s consumes the stream's positions
[s G, (s + 1) G), G being the global batch; within it, micro-batch `part` of process `rank` takes its own run. So every
sample is seen once an epoch, a batch may cross the end of an epoch and may be larger than the dataset, two processes
see what one process with accumulation 2 sees, and resuming needs nothing but the step.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from library.randomness import generator_for


def sample_order(count: int, *, seed: int, epoch: int) -> torch.Tensor:
    """Permutation of range(count) for one epoch, int64."""
    return torch.randperm(count, generator=generator_for(seed, "order", epoch))


@dataclass(frozen=True, kw_only=True, slots=True)
class DataOrder:
    """How `count` samples are dealt to steps, processes and micro-batches of `batch_size`."""

    count: int
    batch_size: int
    accumulation: int = 1
    processes: int = 1
    rank: int = 0
    seed: int = 0

    @property
    def global_batch(self) -> int:
        """Samples of one optimizer step, G."""
        return self.batch_size * self.accumulation * self.processes

    def steps_for(self, epochs: int) -> int:
        """Optimizer steps that see every sample `epochs` times; the last batch goes on into the next epoch."""
        return -(-self.count * epochs // self.global_batch)

    def epoch_at(self, step: int) -> int:
        """Epochs completed when `step` optimizer steps are done."""
        return step * self.global_batch // self.count

    def indices(self, part: int) -> range:
        """Indices in the global batch, [0, G), of this process's micro-batch `part`."""
        start = (part * self.processes + self.rank) * self.batch_size
        return range(start, start + self.batch_size)


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatches:
    """Batch sampler for a data loader: dataset indices of every micro-batch of steps [start, stop) on this process."""

    order: DataOrder
    start: int
    stop: int

    def __len__(self) -> int:
        return max(0, self.stop - self.start) * self.order.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        order, epoch, permutation = self.order, -1, torch.empty(0)
        for step in range(self.start, self.stop):
            for part in range(order.accumulation):
                chosen = []
                for index in order.indices(part):
                    wanted, offset = divmod(step * order.global_batch + index, order.count)
                    if wanted != epoch:
                        epoch, permutation = wanted, sample_order(order.count, seed=order.seed, epoch=wanted)
                    chosen.append(int(permutation[offset]))
                yield chosen
