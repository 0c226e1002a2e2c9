"""States: what is saved comes back bit for bit, and what doesn't fit is named."""

import pytest
import torch
from torch import nn

from library.average import RunningAverage
from library.errors import UserError
from library.optim import make_optimizer, make_scheduler
from library.training_log import TrainingLog
from library.training_state import Progress, find_state, list_states, load_state, save_state

RECIPE = {"seed": 1, "optimizer_args": ("a=1",)}


def make_progress(optimizer: str = "adamw") -> tuple[Progress, RunningAverage]:
    torch.manual_seed(0)
    parameters = {"b.weight": nn.Parameter(torch.randn(4, 3)), "a": nn.Parameter(torch.randn(5))}
    average = RunningAverage(parameters, decay=0.9)
    made = make_optimizer(optimizer, parameters.values(), learning_rate=0.01)
    scheduler = make_scheduler("constant_with_warmup", made, warmup_steps=5, total_steps=9)
    return Progress(parameters=parameters, average=average.tensors, optimizer=made, scheduler=scheduler), average


def run(progress: Progress, average: RunningAverage, start: int, stop: int) -> None:
    for step in range(start, stop):
        sum((p * p).sum() * (step + 1) for p in progress.parameters.values()).backward()
        progress.optimizer.step()
        progress.scheduler.step()
        progress.optimizer.zero_grad()
        average.update(step + 1)


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, optimizer):
    whole, whole_average = make_progress(optimizer)
    run(whole, whole_average, 0, 6)
    first, first_average = make_progress(optimizer)
    run(first, first_average, 0, 3)
    path = save_state(tmp_path, first, step=3, recipe=RECIPE)
    second, second_average = make_progress(optimizer)
    assert load_state(path, second, recipe=RECIPE) == 3
    run(second, second_average, 3, 6)
    for name in whole.parameters:
        assert torch.equal(second.parameters[name], whole.parameters[name])
        assert torch.equal(second.average[name], whole.average[name])
    assert second.scheduler.get_last_lr() == whole.scheduler.get_last_lr()


def test_latest_and_keeping_the_newest(tmp_path):
    progress, _ = make_progress()
    assert find_state("latest", experiment=tmp_path) is None
    for step in (1, 20, 3):
        save_state(tmp_path, progress, step=step, recipe=RECIPE, keep=2)
    assert [step for step, _ in list_states(tmp_path)] == [3, 20]
    assert find_state("latest", experiment=tmp_path) == tmp_path / "state_step_00000020"
    (tmp_path / "state_step_00000099").mkdir()  # not whole: not a state
    assert find_state("latest", experiment=tmp_path) == tmp_path / "state_step_00000020"
    with pytest.raises(UserError, match="--resume nowhere: is no state folder"):
        find_state("nowhere", experiment=tmp_path)


def test_changed_flags_and_damage_are_named(tmp_path):
    progress, _ = make_progress()
    path = save_state(tmp_path, progress, step=1, recipe=RECIPE)
    with pytest.raises(UserError, match="--seed 2: the state .* was made with 1"):
        load_state(path, progress, recipe={"seed": 2})
    (path / "optimizer.safetensors").write_bytes(b"short")
    with pytest.raises(UserError, match="--resume .*: damaged"):
        load_state(path, progress, recipe=RECIPE)


def test_average_in_place():
    progress, average = make_progress()
    run(progress, average, 0, 2)
    before = {name: p.detach().clone() for name, p in progress.parameters.items()}
    with average.in_place():
        assert torch.equal(progress.parameters["a"], average.tensors["a"])
    assert torch.equal(progress.parameters["a"], before["a"])
    assert not torch.equal(average.tensors["a"], before["a"])


def test_log_forgets_what_is_done_again(tmp_path):
    path = tmp_path / "log.jsonl"
    for start in (0, 2):
        log = TrainingLog(path, start=start, total=4, samples_per_step=2, active=True)
        for step in (start + 1, start + 2):
            log.step(step, loss=1.0, lr=0.1)
        if start == 0:
            log.step(3, loss=1.0, lr=0.1)
        log.close()
    assert [line.split(",")[0] for line in path.read_text().splitlines()] == [f'{{"step": {n}' for n in (1, 2, 3, 4)]
