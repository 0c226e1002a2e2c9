"""The scene command: a function of seed, index and size, whoever makes it and however often it is broken off."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from killing import check_kills
from PIL import Image

from dataset.layout import Layout
from dataset.make_scenes import ScenesArgs, make_scenes
from dataset.synthetic import render_batch
from library.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
CAPTIONS_OF_VERSION_1 = "b15d6717c9f57c75"
PICTURES_OF_VERSION_1 = (
    (141.23, 164.65, 133.76),
    (152.73, 209.14, 162.52),
    (158.20, 147.57, 151.01),
    (140.15, 124.05, 111.89),
    (172.84, 147.18, 159.82),
    (138.60, 137.42, 91.59),
)


def content(folder: Path) -> dict[str, bytes]:
    """Every file by its path in the folder, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_pixels_and_captions_of_version_1_are_frozen():
    frames = render_batch(1234, range(6), 64)
    words = render_batch(1234, range(6, 40), 16).captions
    assert hashlib.sha256("\n".join(frames.captions + words).encode()).hexdigest()[:16] == CAPTIONS_OF_VERSION_1
    coarse_B322 = torch.nn.functional.adaptive_avg_pool2d(frames.rgb_B3hw, 2) * 255
    found = coarse_B322.flatten(1)[:, ::5]
    torch.testing.assert_close(found, torch.tensor(PICTURES_OF_VERSION_1), atol=0.06, rtol=0)


def test_command_fills_a_folder_and_goes_on_where_it_stopped(tmp_path):
    args = {"output": tmp_path, "size": 32, "seed": 5}
    assert make_scenes(ScenesArgs(**args, count=3)) == 3
    layout = Layout(tmp_path)
    layout.scene("00000001").unlink()
    layout.image("00000001").unlink()
    before = layout.image("00000000").stat().st_mtime_ns
    assert make_scenes(ScenesArgs(**args, count=4)) == 2
    assert layout.image("00000000").stat().st_mtime_ns == before
    truth = render_batch(5, [1], 32)
    with Image.open(layout.image("00000001")) as image:
        assert np.array_equal(np.asarray(image), (truth.rgb_B3hw[0] * 255).round().byte().permute(1, 2, 0).numpy())
    assert np.array_equal(np.load(layout.depthmap("00000001")), truth.disparity_Bhw[0].numpy())
    assert np.array_equal(np.load(layout.metric("00000001")), truth.metric_Bhw[0].numpy())
    with Image.open(layout.instance_map("00000001")) as image:
        assert np.array_equal(np.asarray(image), truth.ids_Bhw[0].numpy() + 1) and image.mode == "L"
    assert np.load(layout.depthmap("00000001")).dtype == np.float32
    assert layout.prompt("00000001").read_text(encoding="utf-8") == truth.captions[0] + "\n"
    assert json.loads(layout.scene("00000001").read_text(encoding="utf-8")) == truth.records[0]
    assert make_scenes(ScenesArgs(**args, count=4)) == 0


def test_launched_processes_share_the_indices(tmp_path, monkeypatch):
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    assert make_scenes(ScenesArgs(output=alone, size=16, start=3, count=8)) == 8
    monkeypatch.setenv("WORLD_SIZE", "3")
    made = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        made.append(make_scenes(ScenesArgs(output=shared, size=16, start=3, count=8)))
    assert sorted(made) == [2, 3, 3]
    assert content(shared) == content(alone)


def test_leftovers_of_a_killed_run_go_but_nothing_else_does(tmp_path):
    layout = Layout(tmp_path)
    make_scenes(ScenesArgs(output=tmp_path, size=16, count=2))
    left = layout.processed_images / ".00000002.4711.tmp.png"
    other = layout.processed_images / ".00000009.4711.tmp.png"  # perhaps another run is just making it
    for path in (left, other):
        path.write_bytes(b"half")
    (layout.scenes / "notes.txt").write_text("mine")
    make_scenes(ScenesArgs(output=tmp_path, size=16, count=3))
    assert not left.exists() and other.exists() and (layout.scenes / "notes.txt").exists()


def test_command_refuses_to_mix_scenes(tmp_path):
    make_scenes(ScenesArgs(output=tmp_path, count=1, size=32))
    with pytest.raises(UserError, match=r"--output .*: holds scenes of --seed 0, not 1; choose another folder"):
        make_scenes(ScenesArgs(output=tmp_path, count=1, size=32, seed=1))
    with pytest.raises(UserError, match=r"--output .*: holds scenes of --size 32, not 64"):
        make_scenes(ScenesArgs(output=tmp_path, count=1, size=64))
    record = json.loads(Layout(tmp_path).scene("00000000").read_text(encoding="utf-8"))
    Layout(tmp_path).scene("00000000").write_text(json.dumps(record | {"generator_version": 0}), encoding="utf-8")
    with pytest.raises(UserError, match=r"holds scenes of generator 0, this is 1"):
        make_scenes(ScenesArgs(output=tmp_path, count=1, size=32))
    Layout(tmp_path).scene("00000000").write_text("[]", encoding="utf-8")
    with pytest.raises(UserError, match=r"--output .*00000000.json: is no record of a scene"):
        make_scenes(ScenesArgs(output=tmp_path, count=1, size=32))


def test_command_checks_its_flags(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--output .*file: is a file; name a folder"):
        ScenesArgs(output=tmp_path / "file", count=1)
    with pytest.raises(UserError, match=r"--workers 2: one process renders on a GPU|--device cuda: no CUDA device"):
        ScenesArgs(output=tmp_path, count=1, device="cuda", workers=2)
    with pytest.raises(UserError, match=r"--size 1040: must be at most 1024"):
        ScenesArgs(output=tmp_path, count=1, size=1040)


def test_the_seed_of_the_evaluation_is_warned_of(tmp_path, caplog):
    make_scenes(ScenesArgs(output=tmp_path / "own", count=1, size=16))
    assert not caplog.messages
    make_scenes(ScenesArgs(output=tmp_path / "held_out", count=1, size=16, seed=1000001))
    assert caplog.messages == ["--seed 1000001: these scenes are kept for evaluation; don't train on them"]


def command(output: Path, *flags: str) -> list[str]:
    return ["-m", "dataset.make_scenes", "--output", str(output), "--size", "32", "--count", "24", *flags]


@pytest.mark.slow
def test_workers_and_kills_change_no_byte(tmp_path):
    make_scenes(ScenesArgs(output=tmp_path / "alone", size=64, count=72))
    again = [sys.executable, *command(tmp_path / "broken", "--size", "64", "--count", "72", "--workers", "2")]
    layout, instants = Layout(tmp_path / "broken"), random.Random(0)
    for _ in range(2):
        before = len(list(layout.scenes.glob("0*")))
        process = subprocess.Popen(again, cwd=ROOT, start_new_session=True)
        wait_until(lambda before=before: len(list(layout.scenes.glob("0*"))) > before)
        time.sleep(instants.uniform(0, 0.3))
        os.kill(process.pid, signal.SIGKILL)  # the parent alone: its workers must end by themselves
        process.wait()
        wait_until(lambda group=process.pid: not group_lives(group))
    subprocess.run(again, cwd=ROOT, check=True)
    assert content(tmp_path / "broken") == content(tmp_path / "alone")


@pytest.mark.slow
def test_killed_at_twenty_instants(tmp_path):
    def run(folder):
        make_scenes(ScenesArgs(output=folder, size=16, count=10))

    assert len(check_kills(tmp_path, run, content=content, kills=20, least_changes=100)) == 60


def wait_until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
def test_torch_launcher_makes_each_scene_once(tmp_path):
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2"]
    done = subprocess.run(
        [sys.executable, *launcher, *command(tmp_path / "two")], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert done.stdout.strip().endswith("12 rendered by the first of 2 processes")
    make_scenes(ScenesArgs(output=tmp_path / "one", size=32, count=24))
    assert content(tmp_path / "two") == content(tmp_path / "one")


@pytest.mark.slow
def test_the_largest_size(tmp_path):
    make_scenes(ScenesArgs(output=tmp_path, size=1024, count=1))
    layout = Layout(tmp_path)
    small = render_batch(0, [0], 128)
    with Image.open(layout.image("00000000")) as image:
        assert image.size == (1024, 1024)
        coarse = np.asarray(image.resize((128, 128), Image.Resampling.BOX), dtype=np.float32) / 255
    assert np.abs(coarse - small.rgb_B3hw[0].permute(1, 2, 0).numpy()).mean() < 0.02
    assert layout.prompt("00000000").read_text(encoding="utf-8").strip() == small.captions[0]
