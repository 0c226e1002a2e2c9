"""The stream of samples: complete, stateless, the same however it is split, one size a batch."""

from collections import Counter

import pytest
import torch

from library.data_order import DataOrder, MicroBatches, sample_order
from library.randomness import derive_seed

BUCKETS = torch.tensor([0] * 12 + [1] * 8 + [2] * 4)[sample_order(24, seed=9, epoch=0)]
UNEVEN = torch.tensor([0, 1, 0, 2, 0, 1, 0, 0, 1, 0, 0])


def samples(order: DataOrder, start: int = 0, stop: int = 12) -> list[list[int]]:
    return [[pick.sample for pick in batch] for batch in MicroBatches(order=order, start=start, stop=stop)]


def stream(**kwargs) -> list[int]:
    return [sample for batch in samples(DataOrder(seed=3, **kwargs)) for sample in batch]


def test_every_sample_once_an_epoch():
    seen = stream(count=10, batch_size=3)
    for epoch in range(3):
        assert sorted(seen[epoch * 10 : epoch * 10 + 10]) == list(range(10))
    assert seen[:10] != seen[10:20]


def test_one_size_is_the_plain_stream():
    expected = torch.cat([sample_order(10, seed=3, epoch=epoch) for epoch in range(4)])[:36].tolist()
    assert stream(count=10, batch_size=3) == expected
    assert stream(count=10, batch_size=3, buckets=torch.zeros(10, dtype=torch.int64)) == expected


def test_batch_larger_than_the_dataset():
    (batch,) = samples(DataOrder(count=3, batch_size=8), stop=1)
    assert len(batch) == 8 and set(batch) == {0, 1, 2}


def test_picks_say_where_a_sample_is_seen():
    order = DataOrder(count=7, batch_size=2, accumulation=2)
    picks = [pick for batch in MicroBatches(order=order, start=3, stop=5) for pick in batch]
    assert [(pick.step, pick.place) for pick in picks] == [(step, index) for step in (3, 4) for index in range(4)]


@pytest.mark.parametrize("buckets", [None, UNEVEN])
def test_resuming_continues_with_the_next_sample(buckets):
    order = DataOrder(count=11, batch_size=2, accumulation=2, seed=1, buckets=buckets)
    whole = samples(order, stop=9)
    for start in range(9):
        assert samples(order, start=start, stop=9) == whole[2 * start :]
    assert len(MicroBatches(order=order, start=4, stop=9)) == 10


@pytest.mark.parametrize("buckets", [None, UNEVEN])
def test_two_processes_are_accumulation_two(buckets):
    one = DataOrder(count=11, batch_size=2, accumulation=2, buckets=buckets)
    ranks = [
        samples(DataOrder(count=11, batch_size=2, processes=2, rank=rank, buckets=buckets), stop=9) for rank in (0, 1)
    ]
    assert samples(one, stop=9) == [batch for pair in zip(*ranks, strict=True) for batch in pair]
    assert list(one.indices(1)) == list(DataOrder(count=11, batch_size=2, processes=2, rank=1).indices(0)) == [2, 3]


def test_buckets_are_whole_each_epoch_and_never_mixed():
    order = DataOrder(count=24, batch_size=4, seed=5, buckets=BUCKETS)
    assert order.steps_for(3) == 18
    batches = samples(order, stop=18)
    assert all(len({int(BUCKETS[sample]) for sample in batch}) == 1 for batch in batches)
    epochs = [batches[start : start + 6] for start in (0, 6, 12)]
    for epoch in epochs:
        assert sorted(sample for batch in epoch for sample in batch) == list(range(24))
    kinds = [[int(BUCKETS[batch[0]]) for batch in epoch] for epoch in epochs]
    assert kinds[0] != kinds[1] and kinds[0] != sorted(kinds[0])


def test_uneven_buckets_give_every_sample_its_share():
    order = DataOrder(count=11, batch_size=4, seed=5, buckets=UNEVEN)
    seen = Counter(sample for batch in samples(order, stop=order.steps_for(40)) for sample in batch)
    assert all(40 <= seen[sample] <= 44 for sample in range(11))
    first = Counter(sample for batch in samples(order, stop=order.steps_for(1)) for sample in batch)
    assert set(first) == set(range(11))


@pytest.mark.parametrize("buckets", [None, UNEVEN])
def test_epochs_and_steps_agree(buckets):
    for batch_size in (1, 3, 16):
        order = DataOrder(count=11, batch_size=batch_size, accumulation=2, buckets=buckets)
        for epochs in range(1, 20):
            steps = order.steps_for(epochs)
            assert order.epoch_at(steps) >= epochs > order.epoch_at(steps - 1)


def test_steps_for_epochs():
    order = DataOrder(count=10, batch_size=4)
    assert order.steps_for(2) == 5
    assert [order.epoch_at(step) for step in (0, 2, 3, 5)] == [0, 0, 1, 2]


def test_seeds_differ_by_every_part():
    seeds = {
        derive_seed(*parts) for parts in ((1, "a", 2), (1, "a", 3), (2, "a", 2), (1, "b", 2), (12, "a"), (1, "2a"))
    }
    assert len(seeds) == 6
    assert torch.Generator().manual_seed(max(seeds)) is not None
