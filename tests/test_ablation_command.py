"""scripts/ablation.py: what it runs for an arm, what it refuses, and a rehearsal of the whole."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_model import tiny_model

from dataset.layout import Layout
from library.args import parse
from library.errors import UserError
from library.evaluation.ablation import ARMS
from library.files import write_json
from library.training_args import TrainingArgs

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from ablation import (  # noqa: E402
    FROZEN,
    OWN,
    AblationArgs,
    check_settings,
    figures_file,
    main,
    read_results,
    train_command,
)


def arguments(tmp_path, **changes):
    return AblationArgs(**({"image_folder": tmp_path / "scenes", "output": tmp_path / "out"} | changes))


@pytest.fixture
def scenes(tmp_path):
    """A set of two pictures, of which the ablation only reads the names and one record."""
    layout = Layout(tmp_path / "scenes")
    for name in ("00000000", "00000001"):
        write_json(layout.scene(name), {"seed": 0})
        layout.image(name).parent.mkdir(exist_ok=True)
        layout.image(name).touch()
    return layout


def trained_with(args, name="both", seed=2):
    """Return what train.py reads from an arm's command line."""
    command = train_command(args, ARMS[name], run=args.output / "runs" / name, seed=seed, threads=1)
    assert command[0] == "train.py"
    return parse(command[1:], TrainingArgs)


def test_arms_differ_in_the_method_alone(tmp_path):
    args = arguments(tmp_path, steps=200)
    told = {name: trained_with(args, name) for name in ARMS}
    for name, arm in ARMS.items():
        assert (told[name].weighting, told[name].unbalanced_sampling) == (arm.weighting, arm.unbalanced)
        same = replace(told[name], weighting="none", unbalanced_sampling=True, exp_name="same")
        assert same == replace(told["both"], weighting="none", unbalanced_sampling=True, exp_name="same")


def test_runs_can_be_resumed_and_use_the_cache_where_there_is_one(tmp_path):
    args = arguments(tmp_path, steps=200)
    told = trained_with(args)
    assert told.save_state and told.resume == "latest" and told.seed == 2 and told.max_train_steps == 200
    assert not told.is_latent_training
    meta = Layout(args.image_folder).cache_meta
    meta.parent.mkdir(parents=True)
    meta.touch()
    assert trained_with(args).is_latent_training
    assert trained_with(args).prompt_folder == args.output / "prompts"  # encoded once for all runs


def test_train_flags_win_over_the_recipe(tmp_path):
    told = trained_with(arguments(tmp_path, train_flags=("learning_rate=1e-3", "vector_in_ranks=8 8", "no_flip_aug")))
    assert told.learning_rate == 1e-3 and told.vector_in_ranks == (8, 8) and not told.flip_aug


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("--compile", "without dashes"),
        *((f"{name}=1", "sets .* itself") for name in sorted(OWN)),
        *((f"{name}=1", "give --base their folder") for name in FROZEN),
    ],
)
def test_train_flags_that_cannot_be(tmp_path, text, reason):
    with pytest.raises(UserError, match=f"--train_flags {text}: .*{reason}"):
        arguments(tmp_path, train_flags=(text,))


def test_a_folder_of_other_runs_is_refused(tmp_path, scenes, monkeypatch):
    check_settings(arguments(tmp_path, steps=3))
    check_settings(arguments(tmp_path, steps=3, seeds=7, arms=("both",)))  # more runs of the same kind are welcome
    with pytest.raises(UserError, match="holds runs made with steps 3, now 4"):
        check_settings(arguments(tmp_path, steps=4))
    monkeypatch.chdir(tmp_path)
    check_settings(arguments(tmp_path, steps=3, image_folder=Path("scenes")))  # the same folder, told otherwise
    scenes.image("00000002").touch()
    with pytest.raises(UserError, match="holds runs made with training_scenes 2, now 3"):
        check_settings(arguments(tmp_path, steps=3))


def test_the_scenes_that_are_measured_on_are_not_trained_on(tmp_path, scenes):
    write_json(scenes.scene("00000000"), {"seed": 1000001})
    with pytest.raises(UserError, match=r"^--image_folder .*scenes: scenes of seed 1000001 are kept for measuring"):
        check_settings(arguments(tmp_path))


def test_a_folder_without_scenes_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"^--image_folder .*scenes: no scenes there"):
        check_settings(arguments(tmp_path))


@pytest.mark.usefixtures("scenes")
def test_a_folder_of_runs_on_other_weights_is_refused(tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny_model()["ae"].parent, base)
    check_settings(arguments(tmp_path, base=base))
    with (base / "jointdit_addons.safetensors").open("ab") as file:
        file.write(b"another judge")
    with pytest.raises(UserError, match="holds runs made with weights"):
        check_settings(arguments(tmp_path, base=base))


def test_a_folder_that_cannot_be_written_to_is_told_first(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(sys, "argv", ["ablation.py", "--output", str(tmp_path / "file")])
    with pytest.raises(UserError, match=f"^--output {tmp_path}/file: can't be written to"):
        main()


def test_a_device_that_is_not_there_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["ablation.py", "--output", str(tmp_path), "--device", "cuda"])
    with pytest.raises(UserError, match="^--device cuda: this PyTorch sees no CUDA device"):
        main()


def test_results_of_earlier_calls_stay_in_the_table(tmp_path):
    for name, seed in (("both", 10), ("both", 2), ("neither", 1)):
        write_json(figures_file(tmp_path, name, seed), {"depth_absrel": seed})
    (tmp_path / "figures" / "other_seed1.json").touch()
    assert read_results(tmp_path) == {
        "neither": {1: {"depth_absrel": 1}},
        "both": {2: {"depth_absrel": 2}, 10: {"depth_absrel": 10}},
    }
    assert list(read_results(tmp_path)) == ["neither", "both"] and list(read_results(tmp_path)["both"]) == [2, 10]


@pytest.mark.parametrize("name", ["base", "judge"])
def test_missing_weights_are_told_by_the_flag_that_named_them(tmp_path, name):
    with pytest.raises(UserError, match=f"^--{name} {tmp_path}: .*safetensors"):
        arguments(tmp_path, **{name: tmp_path}).judge_paths()


def run(*command):
    """Run a command of this project; return (exit status, everything it said)."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_a_rehearsal_with_two_arms(tmp_path):
    status, said = run("dataset/make_scenes.py", "--output", tmp_path / "scenes", "--count", 4, "--size", 64)
    assert status == 0, said
    command = (
        *("scripts/ablation.py", "--image_folder", tmp_path / "scenes", "--output", tmp_path / "out"),
        *("--arms", "neither", "both", "--seeds", 1, "--steps", 3, "--scenes", 8, "--num_threads", 1),
        *("--sampling_steps", 2, "--depth_steps", 1, "--train_flags", "train_batch_size=2", "mixed_precision=no"),
    )
    status, said = run(*command)
    assert status == 0, said
    out = tmp_path / "out"
    told = json.loads((out / "ablation.json").read_text())
    assert set(told["arms"]) == {"neither", "both"}
    assert {each["outcome"] for each in told["claims"]} == {"not decided"}
    assert 0 < told["arms"]["both"]["mean"]["depth_absrel"] < 2
    assert "Both techniques do better than neither" in (out / "ablation.md").read_text()
    assert not list(out.glob("runs/*/*_step_*"))
    figures = {path.stem: json.loads(path.read_text()) for path in out.glob("figures/*")}
    assert len({told["joint_absrel_true_pairs"] for told in figures.values()}) == 1  # the same judge
    assert len({told["depth_absrel"] for told in figures.values()}) == 2

    before = {path: path.stat().st_mtime_ns for path in out.glob("figures/*")}
    assert len(before) == 2
    status, said = run(*command)  # everything is there
    assert status == 0 and "==" not in said
    assert {path: path.stat().st_mtime_ns for path in out.glob("figures/*")} == before
    status, said = run(*command, "--arms", "both")  # asks for fewer
    assert status == 0 and set(json.loads((out / "ablation.json").read_text())["arms"]) == {"neither", "both"}
