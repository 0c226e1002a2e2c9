"""A model in parts on two processes trains, saves and resumes as whole ones do."""

import os

import pytest
import torch
from safetensors.torch import load_file
from small_training import flags, lines, prepare, run
from training_processes import TrainingRun

from library.args import parse
from library.errors import UserError
from library.training_args import TrainingArgs
from library.training_setup import make_accelerator


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("sharding"))


def train(folder, name, *more):
    argv = flags(folder, "--exp_name", name, "--train_batch_size", "2", "--ema_decay", "0.9", *more)
    both = TrainingRun(argv, folder=folder, processes=2)
    assert both.wait() == [0, 0], both.said()
    return folder / "experiments" / name


def assert_same_training(one, other, *, within):
    expected = load_file(other / "jointdit_addons.safetensors")
    actual = load_file(one / "jointdit_addons.safetensors")
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        torch.testing.assert_close(tensor, expected[name], atol=within, rtol=1e-3)
    for left, right in zip(lines(one), lines(other), strict=True):
        assert left.keys() == right.keys()
        same = [key for key in left if key != "samples_per_second"]
        assert all(left[key] == pytest.approx(right[key], abs=1e-3) for key in same)


@pytest.mark.slow
def test_parts_train_as_whole_models_do(folder):
    watched = (
        *("--ae", str(folder / "ae.safetensors"), "--sample_every_n_steps", "2", "--sample_steps", "1"),
        *("--validation_folder", str(folder / "held_out"), "--val_every_n_steps", "2", "--val_samples", "5"),
        *("--output_resolution", "32", "32", "--gradient_checkpointing"),
    )
    more = ("--save_state", "--save_every_n_steps", "2", "--gradient_accumulation_steps", "2", *watched)
    whole = train(folder, "whole", *more, "--max_train_steps", "4")
    parts = train(folder, "parts", *more, "--max_train_steps", "4", "--shard_model")
    assert_same_training(parts, whole, within=1e-4)
    pictures = [sorted(path.name for path in (of / "sample").rglob("*.*")) for of in (parts, whole)]
    assert pictures[0] == pictures[1] and len(pictures[0]) == 10
    # Stopped half-way and resumed: the same bytes. A state's files are whole tensors.
    train(folder, "resumed", *more, "--max_train_steps", "2", "--shard_model")
    resumed = train(folder, "resumed", *more, "--max_train_steps", "4", "--shard_model", "--resume", "latest")
    for name in ("jointdit_addons.safetensors", "state_step_00000004/optimizer.safetensors"):
        assert (resumed / name).read_bytes() == (parts / name).read_bytes()
    shapes = [
        {name: tensor.shape for name, tensor in load_file(of / "state_step_00000004" / "optimizer.safetensors").items()}
        for of in (parts, whole)
    ]
    assert shapes[0] == shapes[1]


@pytest.mark.slow
def test_parts_compute_in_bfloat16(folder):
    more = ("--max_train_steps", "3", "--mixed_precision", "bf16")
    whole = train(folder, "whole_bf16", *more)
    assert_same_training(train(folder, "parts_bf16", *more, "--shard_model"), whole, within=2e-2)


def test_one_process_has_nothing_to_share(folder):
    with pytest.raises(UserError, match="--shard_model: there is only one process"):
        run(folder, "alone", "--max_train_steps", "1", "--shard_model")


@pytest.mark.parametrize("name", ["FSDP", "DeepSpeed", "Megatron-LM"])
def test_the_launchers_ways_to_share_a_model_are_refused(name, monkeypatch):
    variable = {"FSDP": "FSDP", "DeepSpeed": "DEEPSPEED", "Megatron-LM": "MEGATRON_LM"}[name]
    monkeypatch.setitem(os.environ, f"ACCELERATE_USE_{variable}", "true")
    args = parse(["--image_folder", "x", "--max_train_steps", "1", "--device", "cpu"], TrainingArgs)
    with pytest.raises(UserError, match=f"--config_file: accelerate's {name} saves and resumes in its own way"):
        make_accelerator(args)
