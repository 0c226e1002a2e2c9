"""Whole training runs with the flags that save memory: what must not change, what resumes, what is refused."""

import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from fake_folder import write_base, write_cache, write_prompts
from safetensors.torch import load_file

from library.args import parse
from library.errors import UserError
from library.training import Trainer
from library.training_args import TrainingArgs
from library.training_setup import make_weight_by_weight

ROOT = Path(__file__).parents[2]
SMALL = ("--lora_rank", "4", "--vector_in_ranks", "4", "8", "--txt_in_rank", "8", "--save_precision", "fp32")
BF16 = ("--addons_precision", "bf16", "--mixed_precision", "bf16")
FUSED = ("--fused_backward_pass", "--max_grad_norm", "0")
UNCLIPPED = ("--max_grad_norm", "0")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("memory")
    write_cache(folder / "data")
    write_prompts(folder)
    write_base(folder / "base.safetensors")
    return folder


@pytest.fixture(autouse=True)
def fresh_accelerator():
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def run(folder: Path, name: str, *more: str, steps: int = 3) -> Path:
    """Train in this process; return the experiment's folder."""
    AcceleratorState._reset_state(True)
    sys.argv = [
        *("train.py", "--image_folder", str(folder / "data"), "--is_latent_training", "--prompt_folder", str(folder)),
        *("--pretrained_model_name_or_path", str(folder / "base.safetensors"), "--device", "cpu", "--num_threads", "1"),
        *("--learning_rate", "1e-2", "--output_dir", str(folder / "experiments"), "--exp_name", name, *SMALL),
        *("--max_train_steps", str(steps), "--max_data_loader_n_workers", "0", "--train_batch_size", "2", *more),
    ]
    runpy.run_path(str(ROOT / "train.py"))["main"]()
    return folder / "experiments" / name


def addons(experiment: Path) -> dict[str, torch.Tensor]:
    return load_file(experiment / "jointdit_addons.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def plain(folder):
    return addons(run(folder, "plain", *UNCLIPPED))


@pytest.mark.parametrize(
    "more",
    [
        FUSED,
        (*FUSED, "--gradient_checkpointing"),
        (*UNCLIPPED, "--gradient_checkpointing", "--checkpoint_every", "2"),
    ],
    ids=["fused", "fused and checkpointed", "selective"],
)
def test_saving_memory_changes_no_bit(folder, plain, more):
    assert same(addons(run(folder, f"saving{'_'.join(more)}", *more)), plain)


def test_fused_bf16_is_ordinary_bf16_and_resumes_exactly(folder):
    ordinary = addons(run(folder, "bf16", *BF16, *UNCLIPPED))
    assert same(addons(run(folder, "bf16_fused", *BF16, *FUSED)), ordinary)
    run(folder, "bf16_resumed", *BF16, *FUSED, "--save_state", "--ema_decay", "0.5", steps=2)
    state = folder / "experiments" / "bf16_resumed" / "state_step_00000002"
    assert {tensor.dtype for tensor in load_file(state / "addons.safetensors").values()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in load_file(state / "optimizer.safetensors").values()} == {torch.float32}
    more = (*BF16, *FUSED, "--ema_decay", "0.5")
    resumed = addons(run(folder, "bf16_resumed", *more, "--resume", "latest"))
    assert same(resumed, addons(run(folder, "bf16_whole", *more)))


def test_schedule_free_is_saved_averaged_and_resumes_exactly(folder):
    pytest.importorskip("schedulefree")
    more = ("--optimizer_type", "adamwschedulefree", "--save_every_n_steps", "2")
    whole = addons(run(folder, "free", *more, steps=4))
    run(folder, "free_resumed", *more, "--save_state", steps=2)
    state = load_file(folder / "experiments" / "free_resumed" / "state_step_00000002" / "addons.safetensors")
    shown = addons(folder / "experiments" / "free_resumed")
    assert not same(state, shown)
    assert same(addons(run(folder, "free_resumed", *more, "--resume", "latest", steps=4)), whole)


@pytest.mark.parametrize("kind", ["int8", "fp8", "nf4"])
def test_addons_of_a_packed_base_have_the_released_names(folder, plain, kind):
    if kind == "nf4":
        pytest.importorskip("bitsandbytes")
    trained = addons(run(folder, kind, "--base_precision", kind, *FUSED, "--gradient_checkpointing"))
    assert trained.keys() == plain.keys() and not same(trained, plain)
    assert all(tensor.isfinite().all() for tensor in trained.values())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--addons_precision", "bf16"), "--addons_precision bf16: the computation isn't in bf16"),
        ((*FUSED, "--mixed_precision", "fp16"), "--fused_backward_pass: --mixed_precision fp16 scales"),
        ((*FUSED, "--optimizer_type", "prodigy"), "--fused_backward_pass: --optimizer_type prodigy scales its steps"),
        (
            ("--optimizer_type", "adamwschedulefree", "--ema_decay", "0.9"),
            "--ema_decay 0.9: --optimizer_type adamwschedulefree averages",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(folder, more, message):
    for package in ("prodigyopt", "schedulefree"):
        pytest.importorskip(package)
    with pytest.raises(UserError, match=message):
        run(folder, "refused", *more)


def test_a_fused_pass_of_several_processes_is_refused():
    args = parse(["--image_folder", "x", "--max_train_steps", "1", *FUSED], TrainingArgs)
    accelerator = SimpleNamespace(num_processes=2, mixed_precision="no")
    with pytest.raises(UserError, match="--fused_backward_pass: 2 processes exchange gradients"):
        make_weight_by_weight(args, accelerator, torch.optim.SGD([torch.zeros(1)]), {}, new_optimizer=torch.optim.SGD)


def test_a_fused_pass_with_a_loss_that_is_not_finite_moves_nothing(folder, monkeypatch):
    seen = {}
    loss = Trainer.micro_loss

    def infinite(self, *args, **kwargs):
        seen.setdefault("before", {name: weight.detach().clone() for name, weight in self.trained.items()})
        seen["trainer"] = self
        return loss(self, *args, **kwargs) * float("inf")

    monkeypatch.setattr(Trainer, "micro_loss", infinite)
    with pytest.raises(UserError, match="the loss of step 1 is"):
        run(folder, "infinite", *FUSED)
    assert same({name: weight.detach() for name, weight in seen["trainer"].trained.items()}, seen["before"])
