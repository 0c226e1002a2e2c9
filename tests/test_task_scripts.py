"""The three task scripts: which flags they give to inference.py, with and without the real weights."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from library.args import parse
from library.inference_args import InferenceArgs

ROOT = Path(__file__).resolve().parents[1]
TASKS = ("joint_generation", "depth_estimation", "depth_to_image")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of the scripts whose set-up does nothing and whose `accelerate` writes down what it is given."""
    (tmp_path / "scripts").mkdir()
    for name in (*TASKS, "weights"):
        shutil.copy(ROOT / "scripts" / f"{name}.sh", tmp_path / "scripts")
    (tmp_path / "scripts" / "setup.sh").write_text("jointdit_setup() { :; }\n")
    accelerate = tmp_path / "bin" / "accelerate"
    accelerate.parent.mkdir()
    accelerate.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@" >given\n')
    accelerate.chmod(0o755)
    return tmp_path


def run(project: Path, task: str, *extra: str) -> tuple[list[str], str]:
    """Return what `accelerate` was given, and what the script said."""
    path = f"{project / 'bin'}{os.pathsep}{os.environ['PATH']}"
    command = ["bash", str(project / "scripts" / f"{task}.sh"), *extra]
    done = subprocess.run(command, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=True)
    return (project / "given").read_text().splitlines(), done.stdout


@pytest.mark.parametrize("task", TASKS)
def test_without_the_real_weights_the_embedded_model_is_used_and_said_so(project: Path, task: str) -> None:
    given, said = run(project, task, "--seed", "1", "2")
    launcher = "launch --config_file default_config.yaml --mixed_precision bf16 inference.py".split()
    assert given[: len(launcher)] == launcher
    args = parse(given[len(launcher) :], InferenceArgs)
    assert args.gen_type == task and args.seed == (1, 2) and args.full_bf16 and args.blocks_to_swap == 8
    assert not any(args.weight_paths().values()) and args.output_resolution is args.processing_resolution is None
    assert said.count("\n") == 1 and said.endswith("using the embedded model\n")
    assert args.given_path is None or (ROOT / args.given_path).is_file()


@pytest.mark.parametrize("task", TASKS)
def test_with_the_real_weights_the_flags_are_the_released_ones(project: Path, task: str) -> None:
    (project / "models" / "flux").mkdir(parents=True)
    (project / "models" / "flux" / "flux1-dev.safetensors").touch()
    given, said = run(project, task)
    args = parse(given[given.index("inference.py") + 1 :], InferenceArgs)
    assert {name: str(path) for name, path in args.weight_paths().items()} == {
        "pretrained_model_name_or_path": "models/flux/flux1-dev.safetensors",
        "clip_l": "models/flux/clip_l.safetensors",
        "t5xxl": "models/flux/t5xxl_fp16.safetensors",
        "ae": "models/flux/ae.safetensors",
        "jointdit_addons_path": "models/jointdit/jointdit_addons.safetensors",
    }
    assert said == "" and args.guidance_scale == 3.5 and args.mixed_precision == "bf16"
    assert (args.output_resolution == (1024, 1024)) == (args.given_path is None)
    assert (args.processing_resolution == 0) == (args.given_path is not None)
