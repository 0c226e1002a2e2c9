"""Training that is killed or stopped at any instant goes on with `--resume latest` as if nothing had happened."""

import random
import signal
import time
from pathlib import Path

import pytest
from fake_folder import write_autoencoder, write_base, write_cache, write_prompts
from training_processes import TrainingRun

STEPS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("interrupted")
    write_autoencoder(folder / "ae.safetensors")
    write_cache(folder / "data", autoencoder=folder / "ae.safetensors")
    write_prompts(folder)
    write_base(folder / "base.safetensors")
    return folder


def flags(folder: Path, name: str, *more: str) -> list[str]:
    return [
        *("--image_folder", str(folder / "data"), "--is_latent_training", "--prompt_folder", str(folder)),
        *("--pretrained_model_name_or_path", str(folder / "base.safetensors"), "--device", "cpu", "--num_threads", "1"),
        *("--lora_rank", "4", "--vector_in_ranks", "4", "8", "--txt_in_rank", "8", "--save_precision", "fp32"),
        *("--learning_rate", "1e-2", "--output_dir", str(folder / "experiments"), "--exp_name", name),
        *("--lr_scheduler", "constant_with_warmup", "--lr_warmup_steps", "6", "--max_train_steps", str(STEPS)),
        *("--train_batch_size", "2", "--gradient_accumulation_steps", "2", "--text_dropout", "0.5"),
        *("--ema_decay", "0.9", "--max_data_loader_n_workers", "2"),
        *("--save_state", "--save_every_n_steps", "2", "--save_last_n", "2", "--resume", "latest", *more),
    ]


def result(folder: Path, name: str) -> bytes:
    return (folder / "experiments" / name / "jointdit_addons.safetensors").read_bytes()


def left_over(folder: Path, name: str) -> list[str]:
    return [path.name for path in (folder / "experiments" / name).iterdir() if ".tmp" in path.name]


def interrupted(folder: Path, name: str, number: int, *, times: int, seconds: float, processes: int = 1) -> int:
    """Send signal `number` at `times` random instants and resume each time; return the number of runs.

    The instants spread over the length of a whole run; a run that comes to its end first is checked, and begins anew.
    """
    random_ = random.Random(name)
    sent = runs = 0
    experiment = f"{name}_0"
    while sent < times:
        run = TrainingRun(flags(folder, experiment), folder=folder, workers=2, processes=processes)
        runs += 1
        time.sleep(random_.uniform(0, seconds))
        interrupts = run.alive()
        run.send(number, rank=random_.randrange(processes))
        codes = run.wait()
        sent += interrupts
        assert set(codes) <= {0, -number}, run.said()
        if (folder / "experiments" / experiment / "jointdit_addons.safetensors").exists():
            assert result(folder, experiment) == result(folder, "whole")
            experiment = f"{name}_{runs}"
    run = TrainingRun(flags(folder, experiment), folder=folder, workers=2, processes=processes)
    assert run.wait() == [0] * processes, run.said()
    assert result(folder, experiment) == result(folder, "whole")
    assert left_over(folder, experiment) == []
    return runs


@pytest.fixture(scope="module")
def whole(folder):
    """Train without interruption; return the seconds that takes."""
    warm = TrainingRun(flags(folder, "warm", "--max_train_steps", "1"), folder=folder, workers=2)
    assert warm.wait() == [0], warm.said()
    begin = time.perf_counter()
    run = TrainingRun(flags(folder, "whole"), folder=folder, workers=2)
    assert run.wait() == [0], run.said()
    return time.perf_counter() - begin


@pytest.mark.slow
def test_killed_at_twenty_random_instants(folder, whole):
    interrupted(folder, "killed", signal.SIGKILL, times=20, seconds=whole)


@pytest.mark.slow
def test_stopped_at_random_instants(folder, whole):
    interrupted(folder, "stopped", signal.SIGTERM, times=5, seconds=whole)
