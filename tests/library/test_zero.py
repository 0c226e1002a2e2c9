"""Gradients and optimizer state in parts on two processes train, save and resume as whole ones do."""

import importlib.util

import pytest
import torch
from launched import CONFIGURATIONS, launched
from safetensors.torch import load_file
from small_training import flags, lines, prepare, run
from training_processes import TrainingRun

from library.args import parse
from library.errors import UserError
from library.launcher import as_launched
from library.training_args import TrainingArgs
from library.zero import cut

ZERO = CONFIGURATIONS / "deepspeed_zero2.yaml"
FLAGS = ("--image_folder", "x", "--max_train_steps", "1", "--device", "cpu")
needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed isn't installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("zero"))


def both(folder, name, *more, environment=None):
    argv = flags(folder, "--exp_name", name, "--train_batch_size", "2", "--mixed_precision", "no", *more)
    return TrainingRun(argv, folder=folder, processes=2, environment=environment)


def train(folder, name, *more, environment=None):
    run = both(folder, name, *more, environment=environment)
    assert run.wait() == [0, 0], run.said()
    return folder / "experiments" / name


def state(experiment, name):
    return load_file(experiment / "state_step_00000004" / f"{name}.safetensors")


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("optimizer", [("adamw",), ("sgd", "--optimizer_args", "momentum=0.9")], ids=["adamw", "sgd"])
def test_parts_train_as_whole_optimizers_do(folder, optimizer):
    kind = optimizer[0]
    more = ("--save_state", "--save_every_n_steps", "2", "--gradient_accumulation_steps", "2", "--ema_decay", "0.9")
    more += ("--max_grad_norm", "0.01", "--lr_warmup_steps", "2", "--lr_scheduler", "constant_with_warmup")
    more += ("--optimizer_type", *optimizer)
    whole = train(folder, f"whole_{kind}", *more, "--max_train_steps", "4")
    parts = train(folder, f"parts_{kind}", *more, "--max_train_steps", "4", "--shard_optimizer")
    for name in ("addons", "average", "optimizer"):
        expected, actual = state(whole, name), state(parts, name)
        assert actual.keys() == expected.keys()
        for key, tensor in actual.items():
            torch.testing.assert_close(tensor, expected[key], atol=1e-4, rtol=1e-3)
    for left, right in zip(lines(parts), lines(whole), strict=True):
        assert left.keys() == right.keys()
        assert left["loss"] == pytest.approx(right["loss"], abs=1e-4)
        assert left["grad_norm"] == pytest.approx(right["grad_norm"], rel=1e-3)
    # By the launcher's configuration, stopped half-way and resumed: the same bytes.
    by_config = {"environment": launched(ZERO)}
    train(folder, f"resumed_{kind}", *more, "--max_train_steps", "2", **by_config)
    resumed = train(folder, f"resumed_{kind}", *more, "--max_train_steps", "4", "--resume", "latest", **by_config)
    files = [f"state_step_00000004/{name}.safetensors" for name in ("addons", "average", "optimizer")]
    for name in (*files, "jointdit_addons.safetensors"):
        assert (resumed / name).read_bytes() == (parts / name).read_bytes()


@needs_deepspeed
@pytest.mark.slow
def test_parts_compute_in_bfloat16(folder):
    more = ("--max_train_steps", "3", "--full_bf16", "--mixed_precision", "bf16", "--gradient_checkpointing")
    whole = load_file(train(folder, "whole_bf16", *more) / "jointdit_addons.safetensors")
    parts = load_file(train(folder, "parts_bf16", *more, "--shard_optimizer") / "jointdit_addons.safetensors")
    for key, tensor in parts.items():
        torch.testing.assert_close(tensor, whole[key], atol=2e-2, rtol=1e-3)


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is not None, reason="DeepSpeed is installed")
@pytest.mark.slow
def test_a_missing_deepspeed_is_one_line(folder):
    run = both(folder, "missing", "--max_train_steps", "1", "--shard_optimizer")
    assert run.wait() == [2, 2]
    assert "error: --shard_optimizer: DeepSpeed can't be imported" in run.said()


def test_one_process_has_nothing_to_share(folder):
    with pytest.raises(UserError, match="--shard_optimizer: there is only one process"):
        run(folder, "alone", "--max_train_steps", "1", "--shard_optimizer")


@pytest.mark.parametrize("sizes", [[4, 1, 7], [1], [3, 3], [2, 9, 1, 1]])
@pytest.mark.parametrize("processes", [2, 3, 5])
def test_every_element_is_in_one_part(sizes, processes):
    tensors = [torch.arange(size) + 100 * index for index, size in enumerate(sizes)]
    row = torch.cat(tensors)
    length = -(-row.numel() // processes)
    again = [torch.full_like(tensor, -1) for tensor in tensors]
    for rank in range(processes):
        part = torch.zeros(length, dtype=row.dtype)
        for tensor, put, (there, here) in zip(
            tensors, again, cut(sizes, begin=rank * length, end=(rank + 1) * length), strict=True
        ):
            part[here] = tensor[there]
            assert (put[there] == -1).all()
            put[there] = part[here]
        own = row[rank * length : (rank + 1) * length]
        assert torch.equal(part[: own.numel()], own)
    assert all(torch.equal(put, tensor) for put, tensor in zip(again, tensors, strict=True))


def test_the_launchers_zero_is_the_flag():
    environment = launched(ZERO)
    assert environment["ACCELERATE_USE_DEEPSPEED"] == "true"
    assert as_launched(parse(FLAGS, TrainingArgs), environment) == parse([*FLAGS, "--shard_optimizer"], TrainingArgs)
    assert "ACCELERATE_USE_DEEPSPEED" not in environment  # else accelerate would wrap the model itself


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("zero_stage", "3", "zero_stage 3: to share the weights too, use scripts/accelerate/fsdp2.yaml; set it to 2"),
        ("offload_optimizer_device", "cpu", "the optimizer's state stays on the devices; set it to none"),
        ("offload_param_device", "cpu", "offload_param_device cpu: weights stay on the devices"),
        ("zero3_init_flag", "true", "zero3_init_flag true: it belongs to stage 3"),
        ("zero3_save_16bit_model", "true", "zero3_save_16bit_model true: it belongs to stage 3"),
        ("deepspeed_moe_layer_cls_names", "Moe", "there are no such layers; leave it away"),
        ("gradient_accumulation_steps", "2", "--gradient_accumulation_steps of train.py says it; set it to auto"),
        ("gradient_clipping", "0.5", "--max_grad_norm of train.py says it; set it to auto"),
        ("deepspeed_config_file", "zero.json", "deepspeed_config_file zero.json: train.py's flags say the rest"),
    ],
)
def test_settings_of_zero_that_nothing_would_follow_are_refused(tmp_path, name, value, message):
    config = tmp_path / "other.yaml"
    kept = [line for line in ZERO.read_text().splitlines() if not line.startswith(f"  {name}:")]
    kept.insert(kept.index("deepspeed_config:") + 1, f"  {name}: {value}")
    config.write_text("\n".join(kept))
    with pytest.raises(UserError, match=f"--config_file: .*{message}"):
        as_launched(parse(FLAGS, TrainingArgs), launched(config))
