"""Worker processes: results in order, few tasks under way at a time, and no worker outlives its parent."""

import logging
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

import torch

from library.errors import UserError

Task = TypeVar("Task")
Result = TypeVar("Result")

_WAITING = 4  # tasks under way for each worker: enough that none is ever idle


def map_in_workers(
    function: Callable[[Task], Result], tasks: Iterable[Task], *, workers: int, flag: str = "--workers"
) -> Iterator[Result]:
    """Yield `function(task)` for every task in order, computed by `workers` processes (1: in this one).

    Tasks are taken from their iterator only as they are needed. `function` must be a module's own (or a `partial` of
    one), and computes on one thread. Close the iterator to end the workers early.

    Raises:
        UserError: a worker was killed; and whatever `function` raises.
    """
    if workers == 1:
        yield from map(function, tasks)
        return
    # Forking a process in which torch has started its threads can hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_begin_worker) as pool:
        under_way: deque[Future[Result]] = deque()
        try:
            for task in tasks:
                under_way.append(pool.submit(function, task))
                if len(under_way) >= _WAITING * workers:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        except BrokenProcessPool:
            raise UserError(
                f"{flag} {workers}: one of them was killed, perhaps for want of memory; use fewer"
            ) from None
        finally:
            for future in under_way:
                future.cancel()


def _begin_worker() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all of them; the parent ends its workers
    logging.getLogger().addHandler(logging.NullHandler())  # what the parent says isn't said again by each worker
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent that was killed can't end its workers, and they would wait for tasks for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
