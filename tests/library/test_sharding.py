"""A model in parts on two processes trains, saves and resumes as whole ones do."""

import os

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

FSDP2 = CONFIGURATIONS / "fsdp2.yaml"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("sharding"))


def train(folder, name, *more, environment=None):
    argv = flags(folder, "--exp_name", name, "--train_batch_size", "2", "--ema_decay", "0.9", *more)
    both = TrainingRun(argv, folder=folder, processes=2, environment=environment)
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
    # By the launcher's configuration, stopped half-way and resumed: the same bytes. A state's files are whole tensors.
    by_config = {"environment": launched(FSDP2)}
    config = ("--mixed_precision", "no")  # the configuration's is bf16
    train(folder, "resumed", *more, *config, "--max_train_steps", "2", **by_config)
    more = (*more, *config, "--max_train_steps", "4")
    resumed = train(folder, "resumed", *more, "--resume", "latest", **by_config)
    # Blocks that stay whole until their backward pass: the same bytes.
    kept = train(folder, "kept", *more, environment=launched(FSDP2, "--fsdp_reshard_after_forward", "false"))
    for name in ("jointdit_addons.safetensors", "state_step_00000004/optimizer.safetensors"):
        assert (resumed / name).read_bytes() == (parts / name).read_bytes() == (kept / name).read_bytes()
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


FLAGS = ("--image_folder", "x", "--max_train_steps", "1", "--device", "cpu")


def test_the_launchers_fsdp_2_is_the_flag(tmp_path):
    environment = launched(FSDP2)
    assert {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}.items() <= environment.items()
    by_flag = parse([*FLAGS, "--shard_model", "--gradient_checkpointing"], TrainingArgs)
    assert as_launched(parse(FLAGS, TrainingArgs), environment) == by_flag
    assert "ACCELERATE_USE_FSDP" not in environment  # else accelerate would share the model out itself
    config = tmp_path / "other.yaml"
    text = (
        FSDP2.read_text().replace("forward: true", "forward: false").replace("checkpointing: true", "checkpointing: no")
    )
    more = "  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP\n"
    more += "  fsdp_transformer_layer_cls_to_wrap: DoubleStreamBlock, SingleStreamBlock\n"
    config.write_text(text.replace("  fsdp_version: 2\n", "  fsdp_version: 2\n" + more))
    by_flag = parse([*FLAGS, "--shard_model", "--no_reshard_after_forward"], TrainingArgs)
    assert as_launched(parse(FLAGS, TrainingArgs), launched(config)) == by_flag


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("version", "1", "fsdp_version 1: version 1 is another mechanism; set it to 2, as in scripts/accelerate/fsdp2"),
        ("reshard_after_forward", "FULL_SHARD", "fsdp_reshard_after_forward full_shard: .* set it to true or false"),
        ("offload_params", "true", "fsdp_offload_params true: weights stay on the devices; set it to false"),
        ("cpu_ram_efficient_loading", "true", "every process reads the weights itself; set it to false"),
        ("activation_checkpointing_offload", "true", "activations stay on the device"),
        ("state_dict_type", "SHARDED_STATE_DICT", "files hold whole tensors; set it to FULL_STATE_DICT"),
        ("auto_wrap_policy", "SIZE_BASED_WRAP", "blocks are put together one at a time"),
        ("transformer_layer_cls_to_wrap", "Linear", "layer_cls_to_wrap Linear: .* DoubleStreamBlock,SingleStreamBlock"),
        ("sharding_strategy", "HYBRID_SHARD", "it belongs to version 1; use fsdp_reshard_after_forward"),
        ("backward_prefetch", "BACKWARD_POST", "fsdp_backward_prefetch BACKWARD_POST: version 2 always does this"),
        ("forward_prefetch", "true", "version 2 doesn't do it"),
        ("use_orig_params", "false", "fsdp_use_orig_params false: version 2 always does this"),
    ],
)
def test_settings_of_fsdp_that_nothing_would_follow_are_refused(flag, value, message):
    with pytest.raises(UserError, match=f"--config_file: .*{message}"):
        as_launched(parse(FLAGS, TrainingArgs), launched(FSDP2, f"--fsdp_{flag}", value))


def test_modules_to_be_left_out_are_refused(tmp_path):
    config = tmp_path / "other.yaml"
    config.write_text(
        FSDP2.read_text().replace("  fsdp_version", "  fsdp_ignored_modules: final_layer\n  fsdp_version")
    )
    with pytest.raises(UserError, match="fsdp_ignored_modules final_layer: every weight is shared; leave it away"):
        as_launched(parse(FLAGS, TrainingArgs), launched(config))


@pytest.mark.parametrize(
    ("variable", "name"), [("MEGATRON_LM", "Megatron-LM"), ("PARALLELISM_CONFIG", "parallelism_config")]
)
def test_the_launchers_other_ways_to_share_a_model_are_refused(variable, name):
    with pytest.raises(UserError, match=f"--config_file: {name} isn't done here; use FSDP version 2"):
        as_launched(parse(FLAGS, TrainingArgs), {f"ACCELERATE_USE_{variable}": "true"})


@pytest.mark.slow
def test_parts_are_not_compiled_by_the_launcher(folder):
    argv = flags(folder, "--exp_name", "compiled", "--max_train_steps", "1", "--mixed_precision", "no")
    environment = launched(FSDP2, "--dynamo_backend", "inductor")
    both = TrainingRun(argv, folder=folder, processes=2, environment=environment)
    assert both.wait() == [2, 2]
    assert "error: dynamo_backend INDUCTOR: doesn't go together with --shard_model" in both.said()


def test_one_process_of_the_launchers_configuration_is_refused(folder, monkeypatch):
    for name, value in launched(FSDP2).items():
        monkeypatch.setitem(os.environ, name, value)
    with pytest.raises(UserError, match="there is only one process to share it with"):
        run(folder, "alone_by_config", "--max_train_steps", "1")


def test_keeping_blocks_whole_needs_parts(folder):
    with pytest.raises(UserError, match="--no_reshard_after_forward: has no effect without --shard_model"):
        run(folder, "whole_anyway", "--max_train_steps", "1", "--no_reshard_after_forward")
