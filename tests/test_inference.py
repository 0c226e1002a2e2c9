"""`inference.py` as a person runs it: files written, and one line with exit status 2 for each mistake."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_model import tiny_model

import inference
from library import weight_paths
from library.cli import run_main
from library.fingerprint import fingerprint
from library.images import read_depth, read_rgb
from library.results import file_hash

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def embedded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_paths, "EMBEDDED", tiny_model()["ae"].parent)


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    Image.effect_noise((50, 34), 60).convert("RGBA").save(tmp_path / "picture.png")
    np.save(tmp_path / "map.npy", np.linspace(1, 9, 34 * 50, dtype=np.float32).reshape(34, 50))
    return tmp_path


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Run the command in this process and return its exit status."""
    monkeypatch.setattr(sys, "argv", ["inference.py", *map(str, arguments), "--num_threads", "1"])
    try:
        run_main(inference.main)
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


FAST = ("--steps", 1, "--processing_resolution", 0)


def test_the_three_tasks_write_their_files(inputs: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    out = inputs / "out"
    lines = {
        "depth_estimation": ("--input_image", inputs / "picture.png", *FAST),
        "depth_to_image": ("--input_depth", inputs / "map.npy", "--text_prompt", "a box", *FAST),
        "joint_generation": ("--text_prompt", "A red ball!", "--output_resolution", 50, 34, "--steps", 1),
    }
    for task, line in lines.items():
        assert run(monkeypatch, "--gen_type", task, *line, "--output_dir", out, "--seed", 5) == 0
    captured = capsys.readouterr()
    assert captured.err.count("No weight flags: using the embedded model in ") == 3
    assert captured.out.count("Wrote ") == 3
    stems = {"depth_estimation": "picture", "depth_to_image": "map", "joint_generation": "a-red-ball"}
    for task, stem in stems.items():
        record = json.loads((out / task / f"{stem}_seed5.json").read_text())
        assert record["task"] == task and record["seed"] == 5 and (record["width"], record["height"]) == (50, 34)
        assert record["flags"]["steps"] == 1 and "near = large" in record["depth"] and "torch" in record["versions"]
        assert record["weights_fingerprint"] == {name: fingerprint(path) for name, path in tiny_model().items()}
        assert len(list((out / task).iterdir())) == 5
        disparity = read_depth(out / task / f"{stem}_seed5_depth.npy")
        assert disparity.shape == (34, 50) and disparity.min() >= 0 and disparity.max() <= 1
        assert (read_depth(out / task / f"{stem}_seed5_depth.png") - disparity).abs().max() < 1e-5
    saved = read_rgb(out / "depth_estimation" / "picture_seed5.png")
    assert torch.equal(saved, read_rgb(inputs / "picture.png"))


def test_the_seed_decides_and_nothing_is_overwritten(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = inputs / "out"
    line = ("--gen_type", "depth_estimation", "--input_image", inputs / "picture.png", "--output_dir", out, *FAST)
    assert run(monkeypatch, *line, "--seed", 1, 2) == 0
    assert run(monkeypatch, *line, "--seed", 2, "--output_name", "picture") == 0
    first, second, other = (
        file_hash(out / "depth_estimation" / f"picture_seed{name}_depth.npy") for name in ("2", "2_2", "1")
    )
    assert first == second != other


def test_launched_processes_share_the_seeds(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = (
        "--gen_type",
        "depth_estimation",
        "--input_image",
        inputs / "picture.png",
        "--output_dir",
        inputs / "o",
        *FAST,
    )
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert run(monkeypatch, *line, "--seed", 7, 8, 9) == 0
    assert [path.name for path in (inputs / "o" / "depth_estimation").glob("*.json")] == ["picture_seed8.json"]


def test_the_released_flags_are_accepted_and_told_of(inputs: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    weights = [word for flag, path in tiny_model().items() for word in (f"--{flag}", path)]
    released = "--sdpa --guidance_scale 3.5 --blocks_to_swap 8 --mixed_precision bf16 --save_precision bf16 --full_bf16"
    line = ("--gen_type", "depth_estimation", "--input_image", inputs / "picture.png", "--output_dir", inputs / "out")
    assert run(monkeypatch, *line, *FAST, *weights, *released.split()) == 0
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "warning: --save_precision has no effect here: inference saves no weights",
        "On the CPU: computing in float32 (--device cpu --full_bf16 asks for bf16)",
        "warning: --guidance_scale 3.5 has no effect: this model has no guidance embedding",
        "--blocks_to_swap 8: 0 used, there is no GPU memory to save on cpu",
    ]


def _png(path: Path) -> Path:
    Image.new("RGB", (20, 20), "red").save(path)
    return path


def _strip(path: Path) -> Path:
    Image.new("RGB", (300, 1), "red").save(path)
    return path


def _npy(path: Path, array: np.ndarray) -> Path:
    np.save(path, array.astype(np.float32))
    return path


def _text(path: Path, text: str = "hello") -> Path:
    path.write_text(text)
    return path


def _other_base(folder: Path) -> Path:
    """Write a backbone of the same sizes and other weights."""
    path = tiny_model()["pretrained_model_name_or_path"]
    tensors = load_file(path)
    tensors["img_in.weight"] += 1
    save_file(tensors, folder / "other.safetensors")
    (folder / "other.json").write_text(path.with_suffix(".json").read_text())
    return folder / "other.safetensors"


def _weights(**changed: Path) -> list[object]:
    return [word for flag, path in {**tiny_model(), **changed}.items() for word in (f"--{flag}", path)]


ESTIMATE = ["--gen_type", "depth_estimation", "--input_image"]
PAINT = ["--gen_type", "depth_to_image", "--text_prompt", "x", "--input_depth"]
JOINT = ["--gen_type", "joint_generation", "--text_prompt", "x", "--steps", 1, "--output_resolution", 16, 16]

MISTAKES = {
    "missing file": (lambda d: [*ESTIMATE, d / "no.png"], "--input_image {d}/no.png: no such file"),
    "text file named .png": (lambda d: [*ESTIMATE, _text(d / "a.png")], "--input_image {d}/a.png: is not a picture"),
    "size 0": (lambda d: [*ESTIMATE, _text(d / "a.png", "")], "--input_image {d}/a.png: is empty (size 0)"),
    "NaN": (lambda d: [*PAINT, _npy(d / "a.npy", np.full((4, 4), np.nan))], "--input_depth {d}/a.npy: holds 16 NaN"),
    "constant": (lambda d: [*PAINT, _npy(d / "a.npy", np.ones((4, 4)))], "--input_depth {d}/a.npy: has the same value"),
    "no pixels": (lambda d: [*PAINT, _npy(d / "a.npy", np.ones((0, 4)))], "--input_depth {d}/a.npy: has no pixels"),
    "no prompt": (
        lambda d: [*PAINT[:2], *PAINT[4:], d / "a.npy"],
        "--text_prompt: must be given for --gen_type depth_to",
    ),
    "empty prompt": (lambda d: [*JOINT, "--text_prompt", ""], "--text_prompt: must be given for --gen_type joint_gen"),
    "blank prompt": (lambda d: [*JOINT, "--text_prompt", " "], "--text_prompt: must be given for --gen_type joint_gen"),
    "no input": (lambda d: ESTIMATE[:2], "--input_image: must be given for --gen_type depth_estimation"),
    "input too many": (
        lambda d: [*JOINT, "--input_image", "a"],
        "--input_image a: --gen_type joint_generation doesn't",
    ),
    "no task": (lambda d: [], "--gen_type: must be given"),
    "unknown task": (lambda d: ["--gen_type", "video"], "--gen_type video: must be one of joint_generation, depth"),
    "unknown flag": (lambda d: [*JOINT, "--promt", "x"], "--promt: no such flag"),
    "size flag": (lambda d: [*JOINT, "--output_resolution", 0, 9], "--output_resolution 0: must be at least 1"),
    "too large": (
        lambda d: [*JOINT, "--output_resolution", 9999, 9999],
        "--processing_resolution, --output_resolution: ",
    ),
    "too thin": (lambda d: [*ESTIMATE, _strip(d / "a.png")], "--input_image {d}/a.png: is 300 x 1 pixels, and at"),
    "too many tokens": (
        lambda d: [*JOINT, "--t5xxl_max_token_length", 99999],
        "--t5xxl_max_token_length 99999: must be at most 512",
    ),
    "no xformers for CPUs": (lambda d: [*JOINT, "--xformers", "--device", "cpu"], "--xformers: "),
    "seed twice": (lambda d: [*JOINT, "--seed", 4, 4], "--seed 4 4: 4 is there twice"),
    "seed too big": (lambda d: [*JOINT, "--seed", 2**63], f"--seed {2**63}: must be below 2^63"),
    "nothing to hold": (lambda d: [*JOINT, "--condition_noise", 0.5], "--condition_noise 0.5: --gen_type joint_gen"),
    "no depth of a kind": (lambda d: [*JOINT, "--depth_kind", "depth"], "--depth_kind depth: says what --input_depth"),
    "nothing to process": (lambda d: [*JOINT, "--processing_resolution", 9], "--processing_resolution 9: --gen_type"),
    "name with folder": (lambda d: [*JOINT, "--output_name", "a/b"], "--output_name 'a/b': must be a plain name"),
    "long output name": (lambda d: [*JOINT, "--output_name", "a" * 230], "--output_dir {d}/out: can't be written to"),
    "output is a file": (lambda d: [*JOINT, "--output_dir", _text(d / "f")], "--output_dir {d}/f: can't be written to"),
    "no CUDA": (lambda d: [*JOINT, "--device", "cuda"], "--device cuda: this PyTorch sees no CUDA device"),
    "weights with holes": (
        lambda d: [*JOINT, "--ae", "x"],
        "--pretrained_model_name_or_path, --clip_l, --t5xxl, --joint",
    ),
    "missing weights": (lambda d: [*JOINT, *_weights(ae=d / "no")], "--ae {d}/no: no such file or folder"),
    "wrong checkpoint": (
        lambda d: [*JOINT, *_weights(ae=tiny_model()["clip_l"])],
        "--ae {t}/clip_l.safetensors: ",
    ),
    "add-ons for another base": (
        lambda d: [*JOINT, *_weights(pretrained_model_name_or_path=_other_base(d))],
        "--jointdit_addons_path {t}/jointdit_addons.safetensors: made for another backbone",
    ),
}


def test_a_thin_picture_is_taken_as_it_is_or_at_a_given_size(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = (*ESTIMATE, _strip(inputs / "thin.png"), "--steps", 1, "--output_dir", inputs)
    for size in (("--processing_resolution", 0), ("--output_resolution", 32, 16)):
        assert run(monkeypatch, *line, *size) == 0


def test_a_stretched_result_is_said_in_one_line(inputs: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    line = (*ESTIMATE, inputs / "picture.png", "--steps", 1, "--output_dir", inputs, "--seed", 1, 2)
    assert run(monkeypatch, *line, "--output_resolution", 32, 32) == 0
    said = "warning: --output_resolution 32 32: the input is 50 x 34 pixels, of another aspect; it is stretched"
    assert capsys.readouterr().err.splitlines().count(said) == 1
    assert run(monkeypatch, *line, "--output_resolution", 25, 17) == 0
    assert "aspect" not in capsys.readouterr().err


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_one_line_and_exit_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, case: str) -> None:
    if case == "no CUDA" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    arguments, message = MISTAKES[case]
    status = run(monkeypatch, "--output_dir", tmp_path / "out", *arguments(tmp_path))
    said = capsys.readouterr().err.splitlines()
    assert status == 2
    assert said[-1].startswith("error: " + message.format(d=tmp_path, t=tiny_model()["ae"].parent))
    assert all(line.startswith(("No weight flags", "warning")) for line in said[:-1])
    assert not list(tmp_path.glob("out/*/*"))


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("library.results.write_rgb", full)
    size = ("--output_resolution", 16, 16, "--steps", 1)
    assert run(monkeypatch, *JOINT, *size, "--output_dir", tmp_path) == 2
    assert f"error: --output_dir {tmp_path}: can't be written to (No space left on device)" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [[], ["-m", "accelerate.commands.launch", "--config_file", "default_config.yaml"]])
def test_plain_python_and_accelerate_launch(inputs: Path, launcher: list[str]) -> None:
    line = [*launcher, "inference.py", *ESTIMATE, inputs / "picture.png", *FAST, *_weights(), "--output_dir", inputs]
    done = subprocess.run(
        [sys.executable, *map(str, line)], cwd=ROOT, capture_output=True, text=True, env={**os.environ, "RANK": "0"}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"Wrote {inputs / 'depth_estimation' / 'picture_seed42.png'}")


@pytest.mark.slow
def test_a_mistake_leaves_the_process_with_2(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "inference.py", *ESTIMATE, "no.png"], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (2, "error: --input_image no.png: no such file\n")
