"""Step 1 killed at random instants and run again, and shared by several processes: the same bytes as one quiet run."""

import os
import socket

import pytest
from killing import check_kills, finished, in_child
from nasty_pictures import PNG, noisy, picture, saved
from test_step1_pictures import originals, tree
from tiny_networks import write_dpt, write_llava

from dataset import preprocess_step1
from dataset.step1_args import Step1Args
from library.args import parse

# Imported here, so that the forked children need not: nearly all of a run's time would be that.
from dataset.annotators import captions, depth  # noqa: F401  isort: skip

pytestmark = pytest.mark.slow


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


@pytest.mark.parametrize("originals_flag", ["move", "copy"])
def test_a_killed_run_ends_as_a_quiet_one(tmp_path, networks, originals_flag):
    before = originals(fill(tmp_path / "untouched"))

    def run(folder):
        preprocess_step1.run(arguments(folder, networks, "--originals", originals_flag))

    def nothing_is_lost(folder):
        assert set(before) <= set(originals(folder)), "an original is gone"

    expected = check_kills(
        tmp_path, run, prepare=fill, content=tree, kills=10, least_changes=50, afterwards=nothing_is_lost
    )
    assert sum(path.startswith(b"text_prompts/") for path in expected) == 7


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
