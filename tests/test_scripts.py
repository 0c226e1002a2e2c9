"""The shell scripts' own logic, in a copy of them, with a Python that only writes down what pip is asked for."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FAKE_PYTHON = """#!/usr/bin/env bash
if [ "$1" = -m ]; then echo "$@" >>"{log}"; exit 0; fi
exec "{python}" "$@"
"""


@pytest.fixture
def copy(tmp_path):
    """A folder with the scripts and a ready .venv whose pip is a notebook, pip.log."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("requirements.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    fake = tmp_path / ".venv" / "bin" / "python"
    fake.parent.mkdir(parents=True)
    fake.write_text(FAKE_PYTHON.format(log=tmp_path / "pip.log", python=sys.executable))
    fake.chmod(0o755)
    return tmp_path


def run(copy, script, *arguments, **variables):
    """Run one script from another folder, without an active environment; return (exit status, stdout, stderr)."""
    outside = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "CONDA_PREFIX")}
    command = ["bash", str(copy / "scripts" / script), *arguments]
    done = subprocess.run(command, cwd="/", env={**outside, **variables}, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout, done.stderr


def installs(copy):
    log = copy / "pip.log"
    return log.read_text().splitlines() if log.exists() else []


def test_setup_installs_once(copy):
    status, said, _ = run(copy, "setup.sh")
    assert status == 0 and "To download" in said and "No model weights" in said
    assert len(installs(copy)) == 1 and installs(copy)[0].endswith("-r requirements.txt")
    assert run(copy, "setup.sh") == (0, "", "")
    assert len(installs(copy)) == 1


def test_setup_installs_again_when_requirements_change(copy):
    run(copy, "setup.sh")
    with (copy / "requirements.txt").open("a") as file:
        file.write("# changed\n")
    run(copy, "setup.sh")
    assert len(installs(copy)) == 2


def test_an_install_with_extras_holds_the_plain_one(copy):
    run(copy, "setup.sh", "dev", "exr")
    assert installs(copy)[0].endswith("-r requirements.txt -e .[dev,exr]")
    run(copy, "setup.sh")
    assert len(installs(copy)) == 1


def test_torch_index_is_used_for_torch_only(copy):
    run(copy, "setup.sh", JOINTDIT_TORCH_INDEX="https://example.org/cpu")
    first, second = installs(copy)
    assert "--index-url https://example.org/cpu torch==" in first and "-r requirements.txt" not in first
    assert "--index-url" not in second and "-r requirements.txt" in second


def test_a_python_that_does_not_work_is_named(copy):
    shutil.rmtree(copy / ".venv")
    status, _, error = run(copy, "setup.sh", JOINTDIT_PYTHON="/no/such/python")
    assert status == 2
    assert error.splitlines() == [
        "scripts/setup.sh: JOINTDIT_PYTHON=/no/such/python: does not run, is older than 3.11 or has no venv module"
    ]


def test_download_refuses_unknown_parts_before_anything_else(copy):
    status, _, error = run(copy, "download_models.sh", "fluxx")
    assert status == 2 and installs(copy) == []
    assert error.splitlines() == ["scripts/download_models.sh: fluxx: unknown; choose from flux, text, addons"]


def test_download_leaves_alone_what_is_there(copy):
    """With all files in place, nothing is asked of the hub: `hf` would fail here."""
    wanted = ["flux/flux1-dev", "flux/ae", "flux/clip_l", "flux/t5xxl_fp16", "jointdit/jointdit"]
    for name in wanted:
        path = copy / "models" / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    for name in ("tokenizer/vocab.json", "tokenizer_2/spiece.model"):
        path = copy / "models" / "flux" / name
        path.parent.mkdir()
        path.write_bytes(b"x")
    hf = copy / ".venv" / "bin" / "hf"
    hf.write_text("#!/bin/sh\nexit 1\n")
    hf.chmod(0o755)
    status, said, _ = run(copy, "download_models.sh")
    assert status == 0 and said.count("have  models/") == 7
    (copy / "models" / "flux" / "ae.safetensors").unlink()
    status, _, error = run(copy, "download_models.sh")
    assert status == 2 and "accept the licence" in error and "hf auth login" in error
