"""Step 1 killed at random instants and run again, and shared by several processes: the same bytes as one quiet run."""

import os
import shutil
import signal
import socket
import sys
import threading
import time

import numpy as np
import pytest
import torch
from nasty_pictures import PNG, noisy, picture, saved
from test_step1_pictures import originals, tree
from tiny_networks import write_dpt, write_llava
from tqdm import tqdm

from dataset import preprocess_step1
from dataset.step1_args import Step1Args
from library.args import parse

# Imported here, so that the forked children need not: nearly all of a run's time would be that.
from dataset.annotators import captions, depth  # noqa: F401  isort: skip

pytestmark = pytest.mark.slow

KILLS = 20
PATIENCE = 120  # seconds
CHANGES = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "shutil.copyfile")


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("networks")
    write_dpt(folder / "depth")
    write_llava(folder / "llava")
    return folder


def fill(folder):
    """Seven good pictures, two that compete for a name, one that is moved already, and four of other kinds."""
    (folder / "sub").mkdir(parents=True)
    (folder / "raw_images").mkdir()
    for number, path in enumerate(["a.png", "b.png", "sub/c.png", "sub/a.png", "b.jpg", "raw_images/d.png", "e.gif"]):
        (folder / path).write_bytes(saved(noisy(number, 44 + number, 40)))
    (folder / "small.png").write_bytes(saved(picture(8, 8)))
    (folder / "text.png").write_bytes(b"no picture")
    (folder / "cut.png").write_bytes(PNG[:-40])
    (folder / "link.png").symlink_to("a.png")
    return folder


def arguments(folder, networks, *more):
    return parse(
        ["--image_folder", str(folder), "--resolution", "32", "--device", "cpu", "--depth_model",
         str(networks / "depth"), "--caption_model", str(networks / "llava"), "--caption_tokens", "5",
         "--depth_batch_size", "2", "--caption_batch_size", "3", *more], Step1Args)  # fmt: skip


def in_child(run):
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


def finished(child):
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


def count_changes(folder, *, then):
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


@pytest.mark.parametrize("originals_flag", ["move", "copy"])
def test_a_killed_run_ends_as_a_quiet_one(tmp_path, networks, originals_flag):
    quiet = fill(tmp_path / "quiet")
    before = originals(quiet)
    counted = tmp_path / "counted"
    begin = time.monotonic()

    def count():
        count_changes(quiet, then=lambda number: counted.write_text(str(number)))
        preprocess_step1.run(arguments(quiet, networks, "--originals", originals_flag))

    assert finished(in_child(count))
    seconds, changes = time.monotonic() - begin, int(counted.read_text())
    expected = tree(quiet)
    assert changes > 50 and sum(path.startswith(b"text_prompts/") for path in expected) == 7
    random = np.random.default_rng(7)
    for kill in range(KILLS // 2):
        folder = fill(tmp_path / f"{originals_flag} {kill}")
        args = arguments(folder, networks, "--originals", originals_flag)
        if kill % 3:  # before one of the changes on disk, where it matters
            at = int(random.integers(1, changes + 1))

            def killed(folder=folder, args=args, at=at):
                count_changes(folder, then=lambda number: number == at and os.kill(os.getpid(), signal.SIGKILL))
                preprocess_step1.run(args)

            child = in_child(killed)
        else:  # and at any time
            child = in_child(lambda args=args: preprocess_step1.run(args))
            time.sleep(float(random.uniform(0, seconds)))
            os.kill(child, signal.SIGKILL)
        finished(child)
        assert set(before) <= set(originals(folder)), "an original is gone"
        assert finished(in_child(lambda args=args: preprocess_step1.run(args)))
        assert tree(folder) == expected, f"killed at {at if kill % 3 else 'a moment'}"
        shutil.rmtree(folder)


def test_processes_share_the_work(tmp_path, networks):
    alone, shared = fill(tmp_path / "alone"), fill(tmp_path / "shared")
    one_by_one = ("--depth_batch_size", "1", "--caption_batch_size", "1")  # a batch's company shows in the last digits
    assert finished(in_child(lambda: preprocess_step1.run(arguments(alone, networks, *one_by_one))))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])

    def process(rank):
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": "3", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "3",
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # fmt: skip
        preprocess_step1.run(arguments(shared, networks, *one_by_one))

    children = [in_child(lambda rank=rank: process(rank)) for rank in range(3)]
    assert [finished(child) for child in children] == [True] * 3
    assert tree(shared) == tree(alone)
