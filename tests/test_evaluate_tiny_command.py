"""scripts/evaluate_tiny.py: what it refuses before the long work, and what it writes."""

import json
import sys
from pathlib import Path

import pytest
import torch
from tiny_model import tiny_model

from library.errors import UserError
from library.fingerprint import fingerprints
from library.weight_paths import embedded_files

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import evaluate_tiny  # noqa: E402


def evaluate(monkeypatch, *words):
    """Run the command here."""
    monkeypatch.setattr(sys, "argv", ["evaluate_tiny.py", *map(str, ("--num_threads", 1, *words))])
    evaluate_tiny.main()


@pytest.mark.parametrize("name", ["json", "markdown"])
def test_a_file_that_cannot_be_written_is_told_first(tmp_path, monkeypatch, name):
    with pytest.raises(UserError, match=f"^--{name} {tmp_path}: can't be written to"):
        evaluate(monkeypatch, f"--{name}", tmp_path)


def test_a_device_that_is_not_there_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="^--device cuda: this PyTorch sees no CUDA device"):
        evaluate(monkeypatch, "--device", "cuda")
    with pytest.raises(UserError, match="^--device foo: must be one of auto, cuda, mps, cpu"):
        evaluate(monkeypatch, "--device", "foo")


@pytest.mark.parametrize("text", ["3", "[1]", '{"depth_absrel": null}', "{}"])
def test_what_is_no_earlier_result_is_refused_first(tmp_path, monkeypatch, text):
    (tmp_path / "earlier.json").write_text(text)
    with pytest.raises(UserError, match="^--compare .*: holds no figures of this command"):
        evaluate(monkeypatch, "--compare", tmp_path / "earlier.json")


def test_a_result_says_what_was_measured_and_is_compared(tmp_path, monkeypatch, capsys):
    folder, earlier = tiny_model()["ae"].parent, tmp_path / "earlier.json"
    small = ("--model_folder", folder, "--scenes", 2, "--measures", "depth", "--depth_steps", 1)
    small += ("--size", 64, "--training_scenes", 1)
    evaluate(monkeypatch, *small, "--json", earlier)
    told = json.loads(earlier.read_text())
    assert told["weights"] == fingerprints(embedded_files(folder=folder)) and told["measures"] == ["depth"]
    told |= {"depth_absrel": 0.5, "scenes": 9, "depth_delta1": None}
    earlier.write_text(json.dumps(told))
    capsys.readouterr()
    evaluate(monkeypatch, *small, "--compare", earlier)
    said = capsys.readouterr().out
    assert "compared under other settings: scenes 9 -> 2\ndepth_absrel: 0.500 -> " in said
    assert "depth_delta1:" not in said
