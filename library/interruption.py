"""SIGTERM and SIGINT as a polite request to stop at the next safe point."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class StopRequest:
    """Whether, and by which signal, the process was asked to stop."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __bool__(self) -> bool:
        return self.signal is not None

    def __str__(self) -> str:
        return signal.Signals(self.signal).name if self.signal is not None else "a signal to another process"


@contextmanager
def stop_requests(request: StopRequest) -> Iterator[None]:
    """Within the block the first SIGTERM or SIGINT only sets the request; a second one acts as usual."""
    before: dict[int, Any] = {}

    def note(number: int, frame: FrameType | None) -> None:
        request.signal = number
        signal.signal(number, before[number])

    for caught in (signal.SIGTERM, signal.SIGINT):
        before[caught] = signal.getsignal(caught)
        signal.signal(caught, note)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
