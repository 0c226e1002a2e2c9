"""Training that is killed or stopped at any instant goes on with `--resume latest` as if nothing had happened."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_training import ROOT, prepare
from small_training import flags as plain_flags
from training_processes import TrainingRun

from library.experiment import LOCK
from library.interruption import StopRequest, stop_requests

STEPS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("interrupted"))


def flags(folder: Path, name: str, *more: str) -> list[str]:
    return [
        *plain_flags(folder, "--exp_name", name, "--max_train_steps", str(STEPS)),
        *("--lr_scheduler", "constant_with_warmup", "--lr_warmup_steps", "6", "--max_data_loader_n_workers", "2"),
        *("--train_batch_size", "2", "--gradient_accumulation_steps", "2", "--text_dropout", "0.5"),
        *("--ema_decay", "0.9", "--save_state", "--save_every_n_steps", "2", "--save_last_n", "2"),
        *("--resume", "latest", *more),
    ]


def result(folder: Path, name: str) -> bytes:
    return (folder / "experiments" / name / "jointdit_addons.safetensors").read_bytes()


def left_over(folder: Path, name: str) -> list[str]:
    return [path.name for path in (folder / "experiments" / name).iterdir() if ".tmp" in path.name]


def interrupted(folder: Path, name: str, number: int, *, times: int, seconds: float) -> None:
    """Send signal `number` at `times` random instants and resume each time.

    The instants spread over the length of a whole run; a run that comes to its end first is checked, and begins anew.
    """
    random_ = random.Random(name)
    sent = runs = 0
    experiment = f"{name}_0"
    while sent < times:
        run = TrainingRun(flags(folder, experiment), folder=folder, workers=2)
        runs += 1
        time.sleep(random_.uniform(0, seconds))
        sent += run.alive()
        run.send(number)
        assert run.wait()[0] in (0, -number), run.said()
        if (folder / "experiments" / experiment / "jointdit_addons.safetensors").exists():
            assert result(folder, experiment) == result(folder, "whole")
            experiment = f"{name}_{runs}"
    run = TrainingRun(flags(folder, experiment), folder=folder, workers=2)
    assert run.wait() == [0], run.said()
    assert result(folder, experiment) == result(folder, "whole")
    assert left_over(folder, experiment) == []


@pytest.fixture(scope="module")
def whole(folder):
    """Train without interruption; return the seconds that takes."""
    warm = TrainingRun(flags(folder, "warm", "--max_train_steps", "1"), folder=folder, workers=2)
    assert warm.wait() == [0], warm.said()
    begin = time.perf_counter()
    run = TrainingRun(flags(folder, "whole"), folder=folder, workers=2)
    assert run.wait() == [0], run.said()
    return time.perf_counter() - begin


@pytest.mark.slow
def test_killed_at_twenty_random_instants(folder, whole):
    interrupted(folder, "killed", signal.SIGKILL, times=20, seconds=whole)


def steps_done(folder: Path, name: str) -> int:
    log = folder / "experiments" / name / "log.jsonl"
    return len(log.read_text().splitlines()) if log.exists() else 0


@pytest.mark.slow
def test_two_processes_killed_and_stopped(folder, whole):
    more = ("--gradient_accumulation_steps", "1")
    run = TrainingRun(flags(folder, "whole_two", *more), folder=folder, processes=2)
    assert run.wait() == [0, 0], run.said()
    for attempt, number in enumerate((signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGTERM)):
        before = steps_done(folder, "two")
        run = TrainingRun(flags(folder, "two", *more), folder=folder, processes=2)
        deadline = time.monotonic() + 60
        while steps_done(folder, "two") < before + 2 and run.alive() and time.monotonic() < deadline:
            time.sleep(0.01)
        # Killed processes die together, as a launcher sees to; one that is asked to stop takes the others along.
        for rank in (0, 1) if number == signal.SIGKILL else (attempt // 2,):
            run.send(number, rank=rank)
        assert run.wait() == ([-number] * 2 if number == signal.SIGKILL else [0, 0]), run.said()
        if number == signal.SIGTERM:
            assert "Stopped by " in run.said()
            assert len(list((folder / "experiments" / "two").glob("state_step_*"))) in (1, 2)
    run = TrainingRun(flags(folder, "two", *more), folder=folder, processes=2)
    assert run.wait() == [0, 0], run.said()
    assert result(folder, "two") == result(folder, "whole_two")
    assert left_over(folder, "two") == []


@pytest.mark.slow
def test_stopped_at_random_instants(folder, whole):
    interrupted(folder, "stopped", signal.SIGTERM, times=20, seconds=whole)


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_costs_nothing(folder, whole):
    run = TrainingRun(flags(folder, "full", "--max_train_steps", "4"), folder=folder)
    assert run.wait() == [0], run.said()
    largest = (folder / "experiments" / "full" / "state_step_00000004" / "optimizer.safetensors").stat().st_size
    run = TrainingRun(flags(folder, "full"), folder=folder, largest_file=largest - 1)
    assert run.wait() == [2]
    error = run.said().splitlines()[-1]
    assert error.startswith(f"error: --output_dir {folder / 'experiments'}: ") and "can't be written (" in error
    assert "state_step_00000004; make room" in error and "Traceback" not in run.said()
    run = TrainingRun(flags(folder, "full"), folder=folder)
    assert run.wait() == [0], run.said()
    assert result(folder, "full") == result(folder, "whole")
    assert left_over(folder, "full") == []


@pytest.mark.slow
def test_two_runs_in_one_folder_are_refused(folder, whole):
    first = TrainingRun(flags(folder, "both"), folder=folder)
    lock = folder / "experiments" / "both" / ".lock"
    while not lock.exists() and first.alive():
        time.sleep(0.01)
    second = TrainingRun(flags(folder, "both"), folder=folder)
    assert second.wait() == [2] and "--exp_name both: another run is training in" in second.said()
    assert first.wait() == [0], first.said()
    assert result(folder, "both") == result(folder, "whole")


@pytest.fixture
def hangup():
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may be run by nohup
    yield signal.SIGHUP
    signal.signal(signal.SIGHUP, before)


def test_hang_ups_only_ask_and_ignored_ones_do_not(hangup):
    request = StopRequest()
    with stop_requests(request):
        assert not request
        signal.raise_signal(hangup)
        signal.raise_signal(hangup)
    assert str(request) == "SIGHUP" and signal.getsignal(hangup) is signal.SIG_DFL
    signal.signal(hangup, signal.SIG_IGN)  # as nohup leaves it
    request = StopRequest()
    with stop_requests(request):
        signal.raise_signal(hangup)
    assert not request and signal.getsignal(hangup) is signal.SIG_IGN


@pytest.mark.slow
def test_closing_the_terminal_saves_a_state(folder):
    more = ("--max_train_steps", "100000", "--save_every_n_steps", "100000", "--max_data_loader_n_workers", "0")
    process, terminal = os.forkpty()
    if process == 0:
        os.chdir(ROOT)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        os.execv(sys.executable, [sys.executable, "train.py", *flags(folder, "hung_up", *more)])
    deadline = time.monotonic() + 60
    while steps_done(folder, "hung_up") < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    os.close(terminal)
    while (ended := os.waitpid(process, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline + 60:
        time.sleep(0.05)
    if ended == (0, 0):
        os.kill(process, signal.SIGKILL)
        ended = os.waitpid(process, 0)
    assert os.waitstatus_to_exitcode(ended[1]) == 0
    assert len(list((folder / "experiments" / "hung_up").glob("state_step_*"))) == 1


@pytest.mark.slow
def test_the_launchers_end_stops_training(folder):
    more = ("--max_train_steps", "100000", "--save_every_n_steps", "100000", "--max_data_loader_n_workers", "0")
    launcher = ("accelerate.commands.launch", "--config_file", "default_config.yaml", "train.py")
    with (folder / "launched.txt").open("w") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", *launcher, *flags(folder, "launched", *more)], cwd=ROOT, stderr=said, stdout=said
        )
        deadline = time.monotonic() + 120
        while steps_done(folder, "launched") < 2 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.terminate()  # it passes nothing on to the process that trains
        process.wait(60)
    experiment = folder / "experiments" / "launched"
    while (experiment / LOCK).exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert "Stopped by the launcher's end at step " in (folder / "launched.txt").read_text()
    assert len(list(experiment.glob("state_step_*"))) == 1
