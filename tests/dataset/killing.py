"""Children that are killed at a chosen moment, for tests of what a stopped run leaves."""

import os
import shutil
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


def _quiet_run(folder: Path, run: Callable[[Path], object], *, notes: Path) -> tuple[float, int]:
    """Let a child `run` in a folder undisturbed; returns its seconds, and how often it changed the folder's files."""
    begin = time.monotonic()

    def count():
        count_changes(folder, then=lambda number: notes.write_text(str(number)))
        run(folder)

    assert finished(in_child(count))
    return time.monotonic() - begin, int(notes.read_text())


def _killed_run(
    folder: Path, run: Callable[[Path], object], *, kill: int, seconds: float, changes: int, random: np.random.Generator
) -> str:
    """Let a child `run` in a folder and kill it; returns when, for a person.

    Two kills of three are before one of its changes on disk, where it matters, the others at any time.
    """
    if kill % 3:
        at = int(random.integers(1, changes + 1))

        def killed():
            count_changes(folder, then=lambda number: number == at and os.kill(os.getpid(), signal.SIGKILL))
            run(folder)

        finished(in_child(killed))
        return f"before change {at}"
    after = float(random.uniform(0, seconds))
    killed_after(after, lambda: run(folder))
    return f"after {after:.3f} s"


def killed_after(seconds: float, run: Callable[[], object]) -> bool:
    """Let a child `run` and kill it after so many seconds; returns whether it had ended by then."""
    child = in_child(run)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL), "the run failed by itself"
    return status == 0


def check_kills(
    scratch: Path,
    run: Callable[[Path], object],
    *,
    prepare: Callable[[Path], object] = lambda folder: None,
    content: Callable[[Path], dict],
    kills: int,
    least_changes: int,
    afterwards: Callable[[Path], object] = lambda folder: None,
) -> dict:
    """Check that a run which is killed and made again leaves what one quiet run does; returns the quiet run's content.

    Each run is in a folder of its own below `scratch`, which `prepare` fills; a quiet run makes `least_changes` or more
    on disk; `afterwards` checks what a kill leaves before the run is made again.
    """
    quiet = scratch / "quiet"
    prepare(quiet)
    seconds, changes = _quiet_run(quiet, run, notes=scratch / "counted")
    expected = content(quiet)
    assert changes >= least_changes
    random = np.random.default_rng(7)
    for kill in range(kills):
        folder = scratch / f"killed {kill}"
        prepare(folder)
        when = _killed_run(folder, run, kill=kill, seconds=seconds, changes=changes, random=random)
        afterwards(folder)
        assert finished(in_child(lambda folder=folder: run(folder)))
        assert content(folder) == expected, f"killed {when}"
        shutil.rmtree(folder)
    return expected
