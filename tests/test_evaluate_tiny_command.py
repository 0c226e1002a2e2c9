"""scripts/evaluate_tiny.py: what it refuses before the long work."""

import sys
from pathlib import Path

import pytest
import torch

from library.errors import UserError

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
