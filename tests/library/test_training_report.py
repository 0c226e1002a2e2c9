"""What a run says of itself: memory, method, progress, and what trackers get."""

import pytest
import torch
from accelerate.utils import is_clearml_available, is_tensorboard_available
from small_training import lines, prepare, run
from torch import nn

from library.args import parse
from library.errors import UserError
from library.idle_flags import idle_flags
from library.optim import make_optimizer
from library.training_args import TrainingArgs
from library.training_report import estimate_memory, optimizer_bytes_per_weight

CPU = torch.device("cpu")


def maker(name):
    return lambda weights: make_optimizer(name, weights, learning_rate=1e-3)


@pytest.mark.parametrize(("name", "low", "high"), [("adamw", 8, 8), ("sgd", 0, 0), ("adafactor", 0, 0.1)])
def test_bytes_an_optimizer_keeps(name, low, high):
    assert low <= optimizer_bytes_per_weight(maker(name), device=CPU) <= high


@pytest.mark.parametrize("name", ["LBFGS", "SparseAdam"])
def test_optimizers_that_want_more_than_gradients_are_named(name):
    with pytest.raises(UserError, match=f"--optimizer_type: {name} can't make a plain step"):
        optimizer_bytes_per_weight(maker(f"torch.optim.{name}"), device=CPU)


def test_memory_is_the_sum_of_what_is_held():
    model = nn.Sequential(nn.Linear(100, 50, dtype=torch.bfloat16), nn.Linear(50, 10))
    model[0].requires_grad_(False)
    trained = list(model[1].parameters())
    estimate = estimate_memory(model, trained=trained, make_optimizer=maker("adamw"), device=CPU, average=True)
    weights = 50 * 10 + 10
    assert (estimate.frozen, estimate.trained, estimate.gradients) == (2 * (5000 + 50), 4 * weights, 4 * weights)
    assert (estimate.optimizer, estimate.average) == (8 * weights, 4 * weights)
    assert estimate.total == 10100 + 20 * weights
    fused = estimate_memory(
        model, trained=trained, make_optimizer=maker("sgd"), device=CPU, one_gradient_at_a_time=True
    )
    assert fused.gradients == 4 * 500 and str(fused).endswith("0.00 trained weights + 0.00 gradients")
    with_encoders = estimate_memory(
        model,
        trained=trained,
        make_optimizer=maker("sgd"),
        device=CPU,
        encoders=[nn.Linear(30, 20), nn.Linear(30, 20, device="meta")],
    )
    assert with_encoders.encoders == 4 * 620 and str(with_encoders).endswith(" + 0.00 encoders")
    assert with_encoders.total == estimate.total + 4 * 620 - 12 * weights
    half = estimate_memory(model, trained=trained, make_optimizer=maker("adamw"), device=CPU, parts=2)
    assert (half.trained, half.gradients, half.optimizer) == (4 * weights, 2 * weights, (8 + 4) * weights / 2)
    # What has been swapped elsewhere doesn't count.
    assert estimate_memory(model, trained=[], make_optimizer=maker("sgd"), device=torch.device("meta")).total == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("report"))


def test_the_first_lines_say_sizes_and_memory(folder, caplog):
    caplog.set_level("INFO", "library")
    run(folder, "said", "--max_train_steps", "1", "--ema_decay", "0.9")
    said = [message for message in caplog.messages if message.startswith(("Training ", "Method", "Expected"))]
    assert said[0].startswith("Training 20,288 of 118,208 parameters on 8 pairs: 1 steps of 1 (1 a batch, ")
    assert said[2].startswith(
        "Expected memory of each process on cpu before activations: 0.00 GB = 0.00 frozen weights"
    )
    assert said[2].endswith(" running average")


def test_networks_that_stay_are_in_the_sum(folder, caplog):
    caplog.set_level("INFO", "library")
    more = ("--sample_every_n_steps", "9", "--ae", str(folder / "ae.safetensors"))
    run(folder, "previewed", "--max_train_steps", "1", *more)
    assert any(message.startswith("Expected") and message.endswith(" encoders") for message in caplog.messages)


IDLE = {
    "max_train_epochs 3": "",
    "clean_flow_shift 0.5": "--no_unbalanced_sampling",
    "prompt_folder p": "",
    "trust_cache": "",
    "save_last_n_addons 1": "",
    "val_samples 3": "",
    "validation_folder v": "",
    "evaluation_prompts e": "",
    "output_resolution 32 32": "",
    "sample_steps 3": "",
    "sample_guidance_scale 2": "",
    "sample_pairs 1": "",
}


@pytest.mark.parametrize("given", IDLE)
def test_flags_that_change_nothing_are_named(given):
    name, *values = given.split()
    words = ("--image_folder", "x", "--max_train_steps", "1", *IDLE[given].split(), f"--{name}", *values)
    assert list(idle_flags(parse(words, TrainingArgs), guided=True)) == [name]


def test_flags_that_change_something_are_not():
    words = (
        "--image_folder x --max_train_epochs 3 --clean_flow_shift 0.5 --is_latent_training --prompt_folder p "
        "--trust_cache --save_every_n_epochs 1 --save_last_n_addons 1 --validation_folder v --val_every_n_steps 2 "
        "--val_samples 3 --sample_at_first --evaluation_prompts e --output_resolution 32 32 --sample_steps 3 "
        "--sample_pairs 1 --guidance_scale 2 --sample_guidance_scale 2"
    )
    args = parse(words.split(), TrainingArgs)
    assert idle_flags(args, guided=True) == {}
    why = "this backbone has no guidance embedding"
    assert idle_flags(args, guided=False) == {"guidance_scale": why, "sample_guidance_scale": why}


def test_a_run_names_what_changes_nothing(folder, caplog):
    run(folder, "idle", "--max_train_steps", "1", "--no_unbalanced_sampling", "--clean_flow_shift", "0.5")
    why = "--no_unbalanced_sampling draws both noise levels from one density"
    assert f"--clean_flow_shift has no effect: {why}" in caplog.messages


def test_the_bar_shows_loss_rate_and_speed(folder, capfd):
    run(folder, "bar", "--max_train_steps", "2")
    bar = capfd.readouterr().err
    assert all(word in bar for word in ("2/2 [", "loss=", "lr=1.00e-02", "samples/s=", "step/s"))


@pytest.mark.skipif(is_clearml_available(), reason="clearml is installed")
def test_a_tracker_without_its_package_is_named(folder):
    with pytest.raises(UserError, match="--log_with clearml: its package isn't installed; install it"):
        run(folder, "x", "--max_train_steps", "1", "--log_with", "clearml")


@pytest.mark.skipif(not is_tensorboard_available(), reason="tensorboard isn't installed (extra: train)")
def test_tensorboard_gets_what_the_log_gets(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    experiment = run(folder, "tracked", "--max_train_steps", "3", "--log_with", "tensorboard")
    events = EventAccumulator(str(experiment / "tracked")).Reload()
    assert {"loss", "lr", "grad_norm", "samples_per_second"} <= set(events.Tags()["scalars"])
    seen = [(event.step, pytest.approx(event.value)) for event in events.Scalars("loss")]
    assert [(line["step"], line["loss"]) for line in lines(experiment)] == seen
