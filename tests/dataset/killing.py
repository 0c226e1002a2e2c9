"""Children that are killed at a chosen moment, for tests of what a stopped run leaves."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

PATIENCE = 120  # seconds
CHANGES = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "shutil.copyfile")


def in_child(run: Callable[[], object]) -> int:
    """Fork a child that calls `run`, silent, and ends; returns its process id."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            silent = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silent, 1)
            os.dup2(silent, 2)
            torch.set_num_threads(1)
            tqdm.set_lock(threading.RLock())  # else forked children share one, and a killed one never gives it back
            run()
            status = 0
        finally:
            os._exit(status)
    return child


def finished(child: int) -> bool:
    """Wait for a child and say whether it ended well; one that hangs is ended."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status == 0
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise TimeoutError(f"process {child} did not end within {PATIENCE} s")


def count_changes(folder: Path, *, then: Callable[[int], object]) -> None:
    """Call `then(number)` before each change of the folder's files that this process makes."""
    number = 0

    def hook(event, values):
        nonlocal number
        if (
            event in CHANGES
            and values
            and str(folder) in os.fsdecode(values[0] if not isinstance(values[0], int) else "")
        ):
            number += 1
            then(number)

    sys.addaudithook(hook)


def quiet_run(folder: Path, run: Callable[[], object], *, notes: Path) -> tuple[float, int]:
    """Let a child `run` undisturbed; returns its seconds, and how often it changed the folder's files."""
    begin = time.monotonic()

    def count():
        count_changes(folder, then=lambda number: notes.write_text(str(number)))
        run()

    assert finished(in_child(count))
    return time.monotonic() - begin, int(notes.read_text())


def killed_run(
    folder: Path, run: Callable[[], object], *, kill: int, seconds: float, changes: int, random: np.random.Generator
) -> str:
    """Let a child `run` and kill it; returns when, for a person.

    Two kills of three are before one of its changes on disk, where it matters, the others at any time.
    """
    if kill % 3:
        at = int(random.integers(1, changes + 1))

        def killed():
            count_changes(folder, then=lambda number: number == at and os.kill(os.getpid(), signal.SIGKILL))
            run()

        finished(in_child(killed))
        return f"before change {at}"
    after = float(random.uniform(0, seconds))
    child = in_child(run)
    time.sleep(after)
    os.kill(child, signal.SIGKILL)
    finished(child)
    return f"after {after:.3f} s"
