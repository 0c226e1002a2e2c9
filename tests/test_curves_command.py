"""scripts/curves.py and scripts/train_shape_finder.py, run small."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_model
import torch
from PIL import Image

from library.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import curves  # noqa: E402


def run(*command):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "text", ["jointdit_addons.safetensors", "many=x.safetensors", "400=", "0=x.safetensors", "²=x.safetensors"]
)
def test_addons_come_with_their_number_of_pairs(text):
    with pytest.raises(UserError, match=f"--addons {text}: must be PAIRS=FILE"):
        curves.CurvesArgs(addons=(text,))


def test_a_number_of_pairs_is_given_once_and_its_file_is_there(tmp_path):
    with pytest.raises(UserError, match="^--addons 10=A 010=B: 10 is there twice"):
        curves.CurvesArgs(addons=("10=A", "010=B"))
    with pytest.raises(UserError, match=f"^--addons {tmp_path}/nope: no such file"):
        curves.CurvesArgs(addons=(f"10={tmp_path}/nope",)).addons_by_pairs()


def test_a_folder_that_cannot_be_written_to_is_told_first(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=f"^--output {tmp_path}/file: can't be written to"):
        draw(monkeypatch, tmp_path / "file")


def test_a_device_that_is_not_there_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="^--device cuda: this PyTorch sees no CUDA device"):
        draw(monkeypatch, tmp_path, "--device", "cuda")


@pytest.fixture
def guided(tmp_path, monkeypatch):
    """Folder of a random model whose backbone has a guidance embedding."""
    monkeypatch.setattr(tiny_model, "FLUX", replace(tiny_model.FLUX, guidance_embed=True))
    return tiny_model.write_tiny_model(tmp_path / "guided")["ae"].parent


def draw(monkeypatch, output, *words, model=None):
    """Run the command here on two scenes and return what it wrote as JSON."""
    small = ("--scenes", 2, "--depth_steps", 1, "--sampling_steps", 1, "--num_threads", 1, "--output", output)
    chosen = ("--model_folder", model or tiny_model.tiny_model()["ae"].parent)
    monkeypatch.setattr(sys, "argv", ["curves.py", *map(str, (*small, *chosen, *words))])
    curves.main()
    return json.loads((output / "curves.json").read_text())


def test_guidance_is_varied_where_the_backbone_has_an_embedding_of_it(tmp_path, monkeypatch, guided):
    told = draw(monkeypatch, tmp_path, "--tasks", "joint", "--steps", 1, "--guidance", 1, 7, model=guided)
    table = told["curves"]["guidance"]["joint"]
    assert list(table) == ["1", "7"] and table["1"] != table["7"]
    assert "## Joint generation against guidance" in (tmp_path / "curves.md").read_text()
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.size == (960, 320)


def test_a_backbone_without_a_guidance_embedding_is_told(tmp_path, monkeypatch):
    told = draw(monkeypatch, tmp_path, "--tasks", "depth", "--steps", 1)
    assert set(told["curves"]) == {"steps"}
    assert "No curve against guidance" in (tmp_path / "curves.md").read_text()
    with pytest.raises(UserError, match="--guidance: the backbone has no guidance embedding"):
        draw(monkeypatch, tmp_path, "--tasks", "depth", "--steps", 1, "--guidance", 2)


def test_points_that_are_there_are_not_measured_again(tmp_path, monkeypatch):
    told = draw(monkeypatch, tmp_path, "--tasks", "depth", "--steps", 2, 1)
    assert list(told["curves"]["steps"]["depth"]) == ["1", "2"]
    path = tmp_path / "curves.json"
    told["curves"]["steps"]["depth"]["2"]["depth_absrel"] = 0.125  # a mark that measuring would wipe out
    path.write_text(json.dumps(told))
    more = draw(monkeypatch, tmp_path, "--tasks", "depth", "--steps", 2, 4)
    assert set(more["curves"]["steps"]["depth"]) == {"1", "2", "4"}
    assert more["curves"]["steps"]["depth"]["2"]["depth_absrel"] == 0.125
    with pytest.raises(UserError, match="holds curves made with other scenes; give another folder"):
        draw(monkeypatch, tmp_path, "--tasks", "depth", "--scenes", 3)


def test_no_point_is_begun_after_the_minutes(tmp_path, monkeypatch, capsys):
    told = draw(monkeypatch, tmp_path, "--tasks", "depth", "--steps", 1, 2, "--minutes", 1e-6)
    said = capsys.readouterr().out
    assert told["curves"] == {} and "2 points are left; start again to go on" in said
    assert said.endswith(f"{tmp_path}/curves.json, curves.md\n") and not (tmp_path / "curves.png").exists()


def test_curve_against_training_pairs(tmp_path, monkeypatch):
    files = [f"{pairs}={tiny_model.tiny_model()['jointdit_addons_path']}" for pairs in (1_234_567, 8)]
    told = draw(monkeypatch, tmp_path, "--addons", *files, "--tasks", "depth", "--steps", 1)
    pairs = told["curves"]["pairs"]["depth"]
    assert pairs["8"] == pairs["1234567"] == told["curves"]["steps"]["depth"]["1"]
    assert "## Depth estimation against training pairs" in (tmp_path / "curves.md").read_text()


@pytest.mark.slow
def test_the_shape_finder_is_made_the_same_each_time(tmp_path):
    for name in ("one", "two"):
        run(
            *("scripts/train_shape_finder.py", "--output", tmp_path / f"{name}.safetensors", "--scenes", 64),
            *("--color_epochs", 1, "--solid_epochs", 1),
        )
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()
