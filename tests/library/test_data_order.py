"""The stream of samples: complete, stateless, the same however it is split."""

import torch

from library.data_order import DataOrder, MicroBatches
from library.randomness import derive_seed


def stream(**kwargs) -> list[int]:
    order = DataOrder(seed=3, **kwargs)
    return [index for batch in MicroBatches(order=order, start=0, stop=12) for index in batch]


def test_every_sample_once_an_epoch():
    seen = stream(count=10, batch_size=3)
    for epoch in range(3):
        assert sorted(seen[epoch * 10 : epoch * 10 + 10]) == list(range(10))
    assert seen[:10] != seen[10:20]


def test_batch_larger_than_the_dataset():
    order = DataOrder(count=3, batch_size=8)
    (batch,) = MicroBatches(order=order, start=0, stop=1)
    assert len(batch) == 8 and set(batch) == {0, 1, 2}


def test_resuming_continues_with_the_next_sample():
    order = DataOrder(count=7, batch_size=2, accumulation=2, seed=1)
    whole = list(MicroBatches(order=order, start=0, stop=9))
    assert list(MicroBatches(order=order, start=4, stop=9)) == whole[8:]
    assert len(MicroBatches(order=order, start=4, stop=9)) == 10


def test_two_processes_are_accumulation_two():
    one = DataOrder(count=11, batch_size=2, accumulation=2)
    alone = list(MicroBatches(order=one, start=0, stop=5))
    ranks = [
        list(MicroBatches(order=DataOrder(count=11, batch_size=2, processes=2, rank=rank), start=0, stop=5))
        for rank in (0, 1)
    ]
    assert alone == [batch for pair in zip(*ranks, strict=True) for batch in pair]
    assert list(one.indices(1)) == list(DataOrder(count=11, batch_size=2, processes=2, rank=1).indices(0)) == [2, 3]


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
