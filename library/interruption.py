"""SIGTERM, SIGINT and a closed terminal as a polite request to stop at the next safe point."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from library.cli import launcher_command


class StopRequest:
    """Whether, and by what, the process was asked to stop: a signal, or the end of its launcher."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self.launcher = os.getppid() if launcher_command() else None

    def __bool__(self) -> bool:
        return self.signal is not None or self.launcher_is_gone

    @property
    def launcher_is_gone(self) -> bool:
        """Whether `accelerate launch` has ended: it passes no signal on to the one process it starts."""
        return self.launcher is not None and os.getppid() != self.launcher

    def __str__(self) -> str:
        if self.launcher_is_gone:
            return "the launcher's end"
        return signal.Signals(self.signal).name if self.signal is not None else "a signal to another process"


@contextmanager
def stop_requests(request: StopRequest) -> Iterator[None]:
    """Within the block the first SIGTERM, SIGINT or SIGHUP only sets the request; a second one acts as usual.

    But for SIGHUP: a terminal that closes sends it twice, by its shell and by itself; and where it is ignored (`nohup`)
    it stays so.
    """
    before: dict[int, Any] = {}

    def note(number: int, frame: FrameType | None) -> None:
        request.signal = number
        signal.signal(number, signal.SIG_IGN if number == signal.SIGHUP else before[number])

    for caught in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if caught == signal.SIGHUP and signal.getsignal(caught) is signal.SIG_IGN:
            continue
        before[caught] = signal.getsignal(caught)
        signal.signal(caught, note)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
