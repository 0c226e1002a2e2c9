"""Training runs on a tiny random base: what moves, resuming, seeds, flags, and the whole command."""

import json
import logging
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from small_training import ROOT, addons, flags, lines, prepare, run
from training_processes import TrainingRun

from library.args import parse
from library.checkpoints import Checkpoints, make_recipe
from library.errors import UserError
from library.flux.attention import KERNELS
from library.jointdit.addons import trainable_parameters
from library.training import Trainer, Watch
from library.training_args import TrainingArgs
from library.training_setup import make_accelerator


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("training"))


THOROUGH = (
    *("--train_batch_size", "2", "--gradient_accumulation_steps", "2", "--text_dropout", "0.5", "--ema_decay", "0.9"),
    *("--lr_scheduler", "constant_with_warmup", "--lr_warmup_steps", "4", "--save_state"),
)


@pytest.fixture(scope="module")
def uninterrupted(folder):
    return run(folder, "uninterrupted", *THOROUGH, "--max_train_steps", "6")


def test_only_addons_train_and_all_of_them(folder, uninterrupted, monkeypatch):
    seen = {}
    monkeypatch.setattr(Trainer, "run", lambda trainer: seen.update(trainer=trainer))
    run(folder, "not_run", "--max_train_steps", "1")
    model = seen["trainer"].bare_model
    expected = {name for name, _ in trainable_parameters(model)}
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == expected
    optimized = {id(p) for group in seen["trainer"].raw_optimizer.param_groups for p in group["params"]}
    assert optimized == {id(parameter) for _, parameter in trainable_parameters(model)}
    trained = load_file(uninterrupted / "jointdit_addons.safetensors")
    assert trained.keys() == expected
    assert all(trained[name].abs().sum() > 0 for name in trained if "lora_B" in name or "joint" in name)


def test_resumed_is_uninterrupted_bit_for_bit(folder, uninterrupted):
    run(folder, "resumed", *THOROUGH, "--max_train_steps", "3")
    resumed = run(folder, "resumed", *THOROUGH, "--max_train_steps", "6", "--resume", "latest")
    assert addons(resumed) == addons(uninterrupted)
    assert [line["step"] for line in lines(resumed)] == [1, 2, 3, 4, 5, 6]
    assert [line["loss"] for line in lines(resumed)] == [line["loss"] for line in lines(uninterrupted)]


def test_stopped_by_a_signal_and_resumed(folder, uninterrupted, monkeypatch):
    def stop_at_two(model, step):
        os.kill(os.getpid(), signal.SIGTERM)
        return {}

    with monkeypatch.context() as patch:
        plain = Trainer.run
        patch.setattr(Trainer, "run", lambda self: (self.watches.append(Watch(look=stop_at_two, steps=2)), plain(self)))
        stopped = run(folder, "stopped", *THOROUGH, "--max_train_steps", "6")
    assert (stopped / "state_step_00000002").is_dir() and not (stopped / "jointdit_addons.safetensors").exists()
    resumed = run(folder, "stopped", *THOROUGH, "--max_train_steps", "6", "--resume", "latest")
    assert addons(resumed) == addons(uninterrupted)


def test_the_seed_decides(folder):
    first, again, other = (
        addons(run(folder, name, "--max_train_steps", "2", "--train_batch_size", "3", "--seed", seed))
        for name, seed in (("first", "1"), ("again", "1"), ("other", "2"))
    )
    assert first == again != other


def test_accumulation_and_large_batches_agree(folder):
    one = run(folder, "one", "--max_train_steps", "2", "--train_batch_size", "4")
    two = run(folder, "two", "--max_train_steps", "2", "--train_batch_size", "2", "--gradient_accumulation_steps", "2")
    for left, right in zip(lines(one), lines(two), strict=True):
        assert left["loss"] == pytest.approx(right["loss"], abs=1e-5)


def test_checkpoints_previews_and_validation(folder, caplog):
    experiment = run(
        folder, "watched", "--max_train_epochs", "2", "--train_batch_size", "2", "--output_name", "joint", "--ae",
        str(folder / "ae.safetensors"), "--sample_at_first", "--sample_every_n_steps", "8", "--sample_steps", "2",
        "--output_resolution", "32", "16", "--validation_folder", str(folder / "held_out"), "--val_every_n_steps", "4",
        "--val_samples", "4", "--save_every_n_epochs", "1", "--gradient_checkpointing",
    )  # fmt: skip
    names = {str(path.relative_to(experiment)) for path in experiment.rglob("*") if path.is_file()}
    pictures = ["prompt_00001.png", "prompt_00002.png", "pair_00000000.png", "pair_00000001.png", "prompts.txt"]
    saved = ["jointdit_addons_step_000004", "jointdit_addons_step_000008", "joint"]
    assert names == {
        "log.jsonl",
        *(f"sample/steps_{step}/{name}" for step in (0, 8) for name in pictures),
        *(f"{name}.{ending}" for name in saved for ending in ("safetensors", "json")),
    }
    held_out = [line for line in lines(experiment) if "val_depth_estimation" in line]
    assert [line["step"] for line in held_out] == [4, 8]
    side_car = json.loads((experiment / "joint.json").read_text())
    assert side_car == {"depth_transform": "none", "is_attnmask_training": False, "is_txt_ids_training": False}


def test_the_time_of_saving_is_not_in_the_rate(folder, monkeypatch):
    save = Checkpoints.save_step_addons
    monkeypatch.setattr(Checkpoints, "save_step_addons", lambda self, step: (time.sleep(0.6), save(self, step)))
    experiment = run(folder, "slow_disk", "--max_train_steps", "4", "--save_every_n_steps", "1")
    assert max(line["samples_per_second"] for line in lines(experiment)[1:]) > 2


def test_checkpointing_changes_nothing(folder):
    plain = run(folder, "plain", "--max_train_steps", "2")
    checkpointed = run(folder, "checkpointed", "--max_train_steps", "2", "--gradient_checkpointing")
    assert addons(plain) == addons(checkpointed)


@pytest.mark.parametrize(("more", "kernel"), [((), "matmul"), (("--sdpa",), "sdpa")])
def test_attention_is_the_one_asked_for(folder, monkeypatch, more, kernel):
    seen = {}
    monkeypatch.setattr(Trainer, "run", lambda trainer: seen.update(kernel=trainer.bare_model.kernel))
    run(folder, "not_run", "--max_train_steps", "1", "--mixed_precision", "bf16", *more)
    assert seen["kernel"] is KERNELS[kernel]


def test_bf16_trains_float32_addons(folder):
    experiment = run(folder, "bf16", "--max_train_steps", "2", "--mixed_precision", "bf16")
    assert all(
        tensor.dtype == torch.float32 for tensor in load_file(experiment / "jointdit_addons.safetensors").values()
    )
    assert all(torch.isfinite(torch.tensor(line["loss"])) for line in lines(experiment))


def test_going_on_from_given_addons(folder, uninterrupted):
    path = str(uninterrupted / "jointdit_addons.safetensors")
    more = ("--max_train_steps", "1", "--jointdit_addons_path", path)
    experiment = run(folder, "fine_tuned", *more, "--learning_rate", "0")
    assert load_file(experiment / "jointdit_addons.safetensors").keys() == load_file(path).keys()
    assert torch.equal(
        load_file(experiment / "jointdit_addons.safetensors")["txt_in.lora_A.weight"],
        load_file(path)["txt_in.lora_A.weight"],
    )
    with pytest.raises(UserError, match="--weighting paper: the add-ons of --jointdit_addons_path were trained with"):
        run(folder, "refused", *more, "--weighting", "paper")
    with pytest.raises(UserError, match="--lora_rank 5 .*: the add-ons of --jointdit_addons_path have 4, 4 8 and 8"):
        run(folder, "refused", *more, "--lora_rank", "5")


RELEASED_FLAGS = """
    --is_latent_training --output_resolution 1024 1024 --depth_transform none --save_model_as safetensors --sdpa
    --persistent_data_loader_workers --max_data_loader_n_workers 16 --seed 42 --gradient_checkpointing
    --mixed_precision bf16 --save_precision bf16 --output_name joint --learning_rate 1e-5 --max_train_epochs 8
    --sdpa --highvram --save_every_n_epochs 1 --optimizer_type adafactor
    --optimizer_args relative_step=False scale_parameter=False warmup_init=False --lr_scheduler constant_with_warmup
    --max_grad_norm 0.0 --timestep_sampling shift --discrete_flow_shift 3.1582 --model_prediction_type raw
    --guidance_scale 1.0 --fused_backward_pass --blocks_to_swap 8 --full_bf16 --sample_every_n_steps 5000
    --save_every_n_steps 25000 --train_batch_size 4 --sample_at_first --exp_name test_training
""".split()


def test_released_flags_parse_and_those_without_effect_are_named(caplog):
    caplog.set_level(logging.WARNING, "library")
    logging.getLogger("library").propagate = True
    args = parse(["--image_folder", "x", *RELEASED_FLAGS], TrainingArgs)
    assert args.max_train_epochs == 8 and args.output_resolution == (1024, 1024) and args.ranks.vector_out == 1024
    for name in ("--save_model_as", "--highvram", "--persistent_data_loader_workers"):
        assert any(record.getMessage().startswith(f"{name} has no effect here") for record in caplog.records)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "--max_train_epochs: how long to train isn't said"),
        (["--max_train_steps", "0"], "--max_train_steps 0: must be at least 1"),
        (
            ["--max_train_steps", "1", "--learning_rat", "1"],
            "--learning_rat: no such flag; did you mean --learning_rate",
        ),
        (
            ["--max_train_steps", "1", "--output_resolution", "1000", "512"],
            "--output_resolution 1000 512: each side must",
        ),
        (["--max_train_steps", "1", "--exp_name", "a/b"], "--exp_name 'a/b': must be a plain name"),
        (["--max_train_steps", "1", "--exp_name", ".."], "--exp_name '..': must be a plain name"),
        (
            ["--max_train_steps", "1", "--is_latent_training", "--posterior", "mean"],
            "--posterior mean: has no effect on cached latents",
        ),
        (
            ["--max_train_steps", "1", "--full_bf16", "--mixed_precision", "fp16"],
            "--mixed_precision fp16: --full_bf16 computes in bf16",
        ),
        (["--max_train_steps", "1", "--val_every_n_steps", "5"], "--val_every_n_steps 5: needs held-out pairs"),
        (["--max_train_steps", "1", "--fused_backward_pass"], "--max_grad_norm 1.0: clipping needs all gradients"),
        (
            ["--max_train_steps", "1", "--fused_backward_pass", "--gradient_accumulation_steps", "2"],
            "--gradient_accumulation_steps 2: --fused_backward_pass frees each gradient",
        ),
        (["--max_train_steps", "1", "--checkpoint_every", "2"], "--checkpoint_every 2: needs --gradient_checkpointing"),
        (
            ["--max_train_steps", "1", "--timestep_sampling", "sigmoid", "--discrete_flow_shift", "2"],
            "--discrete_flow_shift 2.0: has no effect on --timestep_sampling sigmoid",
        ),
        (
            ["--max_train_steps", "1", "--output_resolution", "65536", "512"],
            "--output_resolution 65536 512: ask for no more pixels than 4096 x 4096",
        ),
        (["--max_train_steps", "1", "--text_encoder_device", "gpu"], "--text_encoder_device gpu: is no device; give"),
    ],
)
def test_mistakes_in_flags(more, message):
    with pytest.raises(UserError, match=message):
        parse(["--image_folder", "x", *more], TrainingArgs)


def test_a_launcher_that_computes_elsewhere_is_named(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    args = parse(["--image_folder", "x", "--max_train_steps", "1", "--device", "cuda"], TrainingArgs)
    AcceleratorState._reset_state(True)
    try:
        with pytest.raises(UserError, match="--device cuda: accelerate's configuration computes on cpu; change it"):
            make_accelerator(args)
    finally:
        AcceleratorState._reset_state(True)


@pytest.mark.parametrize("launched", [False, True])
def test_fp16_on_a_cpu_is_refused(monkeypatch, launched):
    given = [] if launched else ["--mixed_precision", "fp16"]
    if launched:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    args = parse(["--image_folder", "x", "--max_train_steps", "1", "--device", "cpu", *given], TrainingArgs)
    AcceleratorState._reset_state(True)
    try:
        with pytest.raises(UserError, match="--mixed_precision fp16: computing on a CPU, where only bf16 and no are"):
            make_accelerator(args)
    finally:
        AcceleratorState._reset_state(True)


def test_resuming_with_another_batch_size_is_refused(folder, uninterrupted):
    with pytest.raises(UserError, match=r"made with .*--train_batch_size 2 \(now 1\), .*; use the same to go on"):
        run(folder, "uninterrupted", "--max_train_steps", "9", "--resume", "latest")


def test_flags_of_text_encoders_that_run_must_stay():
    args = parse(["--image_folder", "x", "--max_train_steps", "1"], TrainingArgs)
    facts = {"names": ("a",), "processes": 1, "total": 1, "precision": "no", "base": None}
    plain = make_recipe(args, **facts)
    assert make_recipe(args, **facts, encodes_text=True) == plain | {
        "clip_activation": "gelu",
        "t5xxl_max_token_length": None,
    }
    assert make_recipe(args, **facts, encoders={"ae": "12ab"}) == plain | {"ae": "(fingerprint 12ab)"}
    assert make_recipe(args, **facts, text_precision=torch.bfloat16) == plain | {
        "text_encoder_device": "(text encoded in bfloat16)"
    }


def launch(*command: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_the_released_command(folder):
    done = launch(
        *(sys.executable, "-m", "accelerate.commands.launch", "--config_file", "default_config.yaml"),
        *(
            "--main_process_port",
            "12342",
            "--mixed_precision",
            "bf16",
            "--num_cpu_threads_per_process",
            "8",
            "train.py",
        ),
        *flags(folder, *RELEASED_FLAGS, "--output_resolution", "32", "32", "--sample_steps", "2"),
        *("--ae", str(folder / "ae.safetensors"), "--max_train_epochs", "2"),
    )
    assert done.returncode == 0, done.stderr
    assert "--highvram has no effect here" in done.stderr
    experiment = folder / "experiments" / "test_training"
    assert (experiment / "joint.safetensors").exists() and (experiment / "sample" / "steps_0").is_dir()
    assert (experiment / "jointdit_addons_step_000002.json").exists()
    assert len(lines(experiment)) >= 4


@pytest.mark.slow
def test_two_processes_are_accumulation_two(folder):
    more = (
        *("--max_train_steps", "3", "--train_batch_size", "2", "--ae", str(folder / "ae.safetensors")),
        *("--sample_every_n_steps", "3", "--sample_steps", "1", "--output_resolution", "32", "32"),
        *("--validation_folder", str(folder / "held_out"), "--val_every_n_steps", "3", "--val_samples", "5"),
    )
    alone = run(folder, "alone", *more, "--gradient_accumulation_steps", "2")
    both = TrainingRun(flags(folder, "--exp_name", "together", *more), folder=folder, processes=2)
    assert both.wait() == [0, 0], both.said()
    together = folder / "experiments" / "together"
    expected = load_file(together / "jointdit_addons.safetensors")
    for name, tensor in load_file(alone / "jointdit_addons.safetensors").items():
        torch.testing.assert_close(expected[name], tensor, atol=1e-4, rtol=1e-3)
    # One log, one set of pictures, one validation loss, whoever made its parts.
    for one, other in zip(lines(together), lines(alone), strict=True):
        assert one.keys() == other.keys()
        assert all(one[key] == pytest.approx(other[key], abs=1e-3) for key in one if key != "samples_per_second")
    pictures = [sorted(path.name for path in (of / "sample").rglob("*.*")) for of in (together, alone)]
    assert pictures[0] == pictures[1] and len(pictures[0]) == 5


@pytest.mark.slow
def test_fewer_processes_than_asked_are_an_error(folder):
    launcher = ("accelerate.commands.launch", "--cpu", "--num_processes", "2")  # starts one
    done = launch(sys.executable, "-m", *launcher, "train.py", *flags(folder, "--max_train_steps", "1"))
    assert done.returncode != 0
    assert "--num_processes 2: only 1 of them work together" in done.stderr
