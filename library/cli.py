"""What every command shares: errors as one line, log lines, threads, and which process speaks."""

import logging
import os
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch

from library.errors import UserError


def run_main(main: Callable[[], None]) -> None:
    """Run a command and exit: 0 when it returns, 2 with one line for a `UserError`, 130 when interrupted.

    Everything else keeps its traceback: it is a fault of the program, not of the person.
    """
    set_up_logging()
    try:
        main()
    except UserError as error:
        sys.stderr.write("error: " + " ".join(str(error).split()) + "\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(130)


def process_rank() -> int:
    """Return this process's place among all launched processes (0 without a launcher)."""
    return int(os.environ.get("RANK", 0))


def process_count() -> int:
    """Return how many processes were launched, on all machines together."""
    return int(os.environ.get("WORLD_SIZE", 1))


def processes_asked_for() -> int:
    """Return how many processes the launcher was asked for, which may be more than it started.

    `accelerate launch --cpu --num_processes N` starts one and doesn't tell it of N, which then stands in the parent's
    command line alone (read on Linux only).
    """
    asked = [value for word, value in pairwise(launcher_command()) if word in ("--num_processes", "--num-processes")]
    return int(asked[0]) if asked and asked[0].isdigit() else process_count()


def launcher_command() -> list[str]:
    """Return the command line of `accelerate launch`, if that started this process (Linux only), else nothing."""
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_text(encoding="utf-8").replace("=", "\0").split("\0")
    except (OSError, UnicodeDecodeError):
        return []
    return words if any("accelerate" in word for word in words[:4]) else []


def local_rank() -> int:
    """Return this process's place among those of this machine."""
    return int(os.environ.get("LOCAL_RANK", 0))


def local_process_count() -> int:
    """Return how many processes run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def is_main_process() -> bool:
    """Whether this process is the one that talks and writes what is written once."""
    return process_rank() == 0


class _Formatter(logging.Formatter):
    """Plain lines; warnings and errors say what they are."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return f"{record.levelname.lower()}: {text}" if record.levelno >= logging.WARNING else text


def set_up_logging(level: int = logging.INFO) -> None:
    """Send this project's log lines to stderr; processes other than the first are silent below errors."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter("%(message)s"))
    for name in ("library", "dataset", "scripts", "__main__"):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.propagate = False
        logger.setLevel(level if is_main_process() else logging.ERROR)


def say(text: str = "") -> None:
    """Print one line of a command's result on stdout, from the main process only."""
    if is_main_process():
        sys.stdout.write(text + "\n")
        sys.stdout.flush()


def set_threads(count: int = 0) -> int:
    """Set how many CPU threads torch uses and return the number; 0 means this process's share of the cores it may use.

    The launcher sets one thread when it finds no setting, which makes a CPU run needlessly slow, so its value isn't
    kept. Equal bytes for equal seeds hold at equal thread counts.
    """
    if count == 0:
        allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        count = max(1, allowed // local_process_count())
    torch.set_num_threads(count)
    return count
