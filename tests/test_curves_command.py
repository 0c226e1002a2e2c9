"""scripts/curves.py and scripts/train_shape_finder.py, run small."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from library.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from curves import CurvesArgs  # noqa: E402


def run(*command):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("text", ["jointdit_addons.safetensors", "many=x.safetensors", "400="])
def test_addons_come_with_their_number_of_pairs(text):
    with pytest.raises(UserError, match=f"--addons {text}: must be PAIRS=FILE"):
        CurvesArgs(addons=(text,))


@pytest.mark.slow
def test_curves_of_two_tasks_and_of_training_pairs(tmp_path):
    addons = ROOT / "assets" / "tiny"
    run(
        *("scripts/curves.py", "--output", tmp_path, "--scenes", 2, "--steps", 2, 1, "--tasks", "depth", "joint"),
        *("--depth_steps", 1, "--addons", f"40={addons}", f"8={addons}", "--num_threads", 1),
    )
    told = json.loads((tmp_path / "curves.json").read_text())
    assert {name: sorted(table) for name, table in told["curves"].items()} == {
        "depth": ["1", "2"],
        "joint": ["1", "2"],
        "pairs": ["40", "8"],
    }
    assert told["curves"]["pairs"]["8"] == told["curves"]["pairs"]["40"] == told["curves"]["depth"]["1"]
    assert told["curves"]["depth"]["1"] != told["curves"]["depth"]["2"]
    text = (tmp_path / "curves.md").read_text()
    assert "## Depth estimation against training pairs" in text and "no guidance embedding" in text
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.size == (960, 640)


@pytest.mark.slow
def test_the_shape_finder_is_made_the_same_each_time(tmp_path):
    for name in ("one", "two"):
        run(
            *("scripts/train_shape_finder.py", "--output", tmp_path / f"{name}.safetensors", "--scenes", 64),
            *("--color_epochs", 1, "--solid_epochs", 1),
        )
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()
