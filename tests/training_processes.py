"""Real `train.py` processes that start at once: a server imports everything, each run is a fork of it."""

import multiprocessing
import os
import runpy
import socket
import sys
from collections.abc import Mapping
from pathlib import Path

import torch

import dataset.training_data  # noqa: F401  (for the server)
import library.training
import library.training_watch  # noqa: F401

ROOT = Path(__file__).parents[1]
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["training_processes"])
_PATHS = os.pathsep.join([str(ROOT), str(ROOT / "tests")])  # where the server finds its imports


def _train(
    argv: list[str], environment: dict[str, str], errors: Path, workers: int | None, largest: int | None
) -> None:
    multiprocessing.set_start_method("fork", force=True)  # for the data loader, as in a process started by hand
    os.chdir(ROOT)
    os.environ.update(environment)
    file = errors.open("ab")
    for stream in (1, 2):
        os.dup2(file.fileno(), stream)
    torch.set_num_threads(1)
    if workers is not None:  # else one core would mean no readers
        library.training.worker_count = lambda asked: workers
    if largest is not None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    sys.argv = ["train.py", *argv]
    runpy.run_path("train.py", run_name="__main__")


class TrainingRun:
    """One run of `train.py` with these flags, in one or several processes that train together."""

    def __init__(
        self,
        argv: list[str],
        *,
        folder: Path,
        processes: int = 1,
        workers: int | None = None,
        largest_file: int | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Start it; what it says goes to `folder`; `largest_file` bounds the bytes of any file it writes.

        `environment` is what a launcher's configuration adds.
        """
        self.errors = folder / f"said_{os.urandom(4).hex()}.txt"
        common = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1"}
        common |= {"MASTER_PORT": str(free_port()), "ACCELERATE_USE_CPU": "true"} if processes > 1 else {}
        self.processes = []
        os.environ["PYTHONPATH"] = _PATHS
        for rank in range(processes):
            places = {"RANK": str(rank), "LOCAL_RANK": str(rank)} | common if processes > 1 else {}
            places |= environment or {}
            process = _CONTEXT.Process(target=_train, args=(argv, places, self.errors, workers, largest_file))
            process.start()
            self.processes.append(process)

    def alive(self) -> bool:
        """Whether any of its processes still runs."""
        return any(process.is_alive() for process in self.processes)

    def send(self, number: int, *, rank: int = 0) -> None:
        """Send a signal to one process, if it still runs."""
        if self.processes[rank].is_alive():
            os.kill(self.processes[rank].pid, number)

    def wait(self, seconds: float = 120) -> list[int | None]:
        """Wait for the end and return the exit codes; minus the signal's number where one ended it."""
        for process in self.processes:
            process.join(seconds)
        for process in self.processes:
            assert process.exitcode is not None, f"still running: {self.said()}"
        return [process.exitcode for process in self.processes]

    def said(self) -> str:
        """What it wrote to stdout and stderr."""
        return self.errors.read_text(errors="replace") if self.errors.exists() else ""


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
