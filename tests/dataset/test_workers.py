"""Worker processes: results in order, tasks taken as needed, and a killed worker is said in one line."""

import os
import signal
from itertools import count, islice

import pytest

from dataset.workers import map_in_workers
from library.errors import UserError


def square(number: int) -> int:
    return number * number


def die_at_three(number: int) -> int:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def refuse_at_three(number: int) -> int:
    if number == 3:
        raise UserError("--flag 3: is too much")
    return number


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_results_come_in_order_from_an_endless_stream(workers):
    results = map_in_workers(square, count(), workers=workers)
    assert list(islice(results, 20)) == [number * number for number in range(20)]
    results.close()


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_errors_of_the_person_come_through(workers):
    with pytest.raises(UserError, match="--flag 3: is too much"):
        list(map_in_workers(refuse_at_three, range(5), workers=workers))


@pytest.mark.slow
def test_a_killed_worker_is_named():
    with pytest.raises(UserError, match="--workers 2: one of them was killed, perhaps for want of memory; use fewer"):
        list(map_in_workers(die_at_three, range(8), workers=2))
