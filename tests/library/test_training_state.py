"""States: what is saved comes back bit for bit, and what doesn't fit is named."""

import os
import signal
import time

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from library.average import RunningAverage
from library.errors import UserError
from library.experiment import remove_left_overs
from library.optim import make_optimizer, make_scheduler
from library.training_log import TrainingLog
from library.training_state import Progress, list_states, load_state, resume_state, save_state, set_aside_later

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
    assert resume_state("latest", progress, experiment=tmp_path, recipe=RECIPE) == 0
    for step in (1, 3, 20):
        save_state(tmp_path, progress, step=step, recipe=RECIPE, keep=2)
    assert [step for step, _ in list_states(tmp_path)] == [3, 20]
    (tmp_path / "state_step_00000099").mkdir()  # not whole: not a state
    assert resume_state("latest", progress, experiment=tmp_path, recipe=RECIPE) == 20
    assert resume_state(str(tmp_path / "state_step_00000003"), progress, experiment=tmp_path, recipe=RECIPE) == 3
    with pytest.raises(UserError, match="--resume nowhere: is no state folder"):
        resume_state("nowhere", progress, experiment=tmp_path, recipe=RECIPE)


def test_a_damaged_newest_state_gives_way_and_never_costs_a_good_one(tmp_path, caplog):
    progress, _ = make_progress()
    for step in (1, 2, 3):
        save_state(tmp_path, progress, step=step, recipe=RECIPE)
    damaged = tmp_path / "state_step_00000003"
    whole = (damaged / "addons.safetensors").read_bytes()
    (damaged / "addons.safetensors").write_bytes(whole[:-1])
    assert resume_state("latest", progress, experiment=tmp_path, recipe=RECIPE) == 2
    warning = f"--resume {damaged}: damaged"
    assert caplog.messages[0].startswith(warning) and caplog.messages[0].endswith("taking state_step_00000002")
    # Kept are the newest of this run, not what it left behind.
    save_state(tmp_path, progress, step=2, recipe=RECIPE, keep=1)
    set_aside_later(tmp_path, 2)
    assert (tmp_path / "set_aside_state_step_00000003" / "addons.safetensors").read_bytes() == whole[:-1]
    save_state(tmp_path, progress, step=4, recipe=RECIPE, keep=1)
    assert [step for step, _ in list_states(tmp_path)] == [4]
    (tmp_path / "state_step_00000004" / "state.json").write_text("{")
    with pytest.raises(UserError, match="--resume .*state_step_00000004: damaged"):
        resume_state("latest", progress, experiment=tmp_path, recipe=RECIPE)


def test_later_states_never_count_as_newest(tmp_path):
    progress, _ = make_progress()
    for step in (20, 3):
        save_state(tmp_path, progress, step=step, recipe=RECIPE, keep=1)
    assert [step for step, _ in list_states(tmp_path)] == [3, 20]


def test_a_state_that_is_there_stays_as_it_is(tmp_path):
    progress, _ = make_progress()
    path = save_state(tmp_path, progress, step=1, recipe=RECIPE)
    before = {file: file.stat().st_ino for file in path.iterdir()}
    assert save_state(tmp_path, progress, step=1, recipe=RECIPE) == path
    assert {file: file.stat().st_ino for file in path.iterdir()} == before


def test_a_kill_leaves_whole_states(tmp_path):
    progress, _ = make_progress()
    for parameter in progress.parameters.values():
        parameter.grad = torch.ones_like(parameter)
    progress.optimizer.step()
    whole = {name: tensor.detach().clone() for name, tensor in progress.parameters.items()}
    for attempt in range(6):
        child = os.fork()
        if child == 0:
            for step in range(100 * attempt + 1, 100 * attempt + 100):
                save_state(tmp_path, progress, step=step, recipe=RECIPE, keep=2)
            os._exit(0)
        deadline = time.monotonic() + 20
        while not any(step > 100 * attempt for step, _ in list_states(tmp_path)) and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.003 * attempt)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        states = list_states(tmp_path)
        assert 1 <= len(states) <= 3  # one too many if killed between writing and deleting
        for step, path in states:
            assert load_state(path, progress, recipe=RECIPE) == step
        assert all(torch.equal(progress.parameters[name], tensor) for name, tensor in whole.items())


STEPS_OF_A_SAVE = ("fsync", "replace", "mkdir", "rmdir", "unlink", "open")  # as pathlib and shutil use them


def die_at(number: int) -> None:
    """Let this process kill itself just before its `number`-th step of a save."""
    count = 0

    def counting(plain):
        def call(*args, **keywords):
            nonlocal count
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return plain(*args, **keywords)

        return call

    for name in STEPS_OF_A_SAVE:
        setattr(os, name, counting(getattr(os, name)))


def test_a_kill_between_any_two_steps_of_a_save_leaves_a_good_state(tmp_path):
    progress, _ = make_progress()
    save_state(tmp_path, progress, step=1, recipe=RECIPE, keep=1)
    found = []
    for number in range(1, 200):
        child = os.fork()
        if child == 0:
            die_at(number)
            save_state(tmp_path, progress, step=number + 1, recipe=RECIPE, keep=1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        step, path = list_states(tmp_path)[-1]
        assert load_state(path, progress, recipe=RECIPE) == step
        found.append(step == number + 1)
        remove_left_overs(tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {path.name for _, path in list_states(tmp_path)}
        if status == 0:
            break
    # Before the new state has its name, the one before counts; afterwards the new one does.
    assert number > 15 and found == sorted(found) and not found[0] and found[-1]


def test_changed_flags_and_damage_are_named(tmp_path):
    progress, _ = make_progress()
    path = save_state(tmp_path, progress, step=1, recipe=RECIPE)
    with pytest.raises(UserError, match=r"made with --seed 1 \(now 2\), --optimizer_args \['a=1'\] \(now \[\]\); use"):
        load_state(path, progress, recipe={"seed": 2, "optimizer_args": ()})
    with pytest.raises(UserError, match=r"made with --newer None \(now True\); use"):
        load_state(path, progress, recipe=RECIPE | {"newer": True})
    assert load_state(path, progress, recipe=RECIPE | {"newer": False, "ae": "(fingerprint 12ab)"}) == 1
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
        log = TrainingLog(path, start=start, total=4, samples_per_step=2, accelerator=Accelerator(cpu=True))
        for step in (start + 1, start + 2):
            log.step(step, loss=1.0, lr=0.1)
        if start == 0:
            log.step(3, loss=1.0, lr=0.1)
        log.close()
    assert [line.split(",")[0] for line in path.read_text().splitlines()] == [f'{{"step": {n}' for n in (1, 2, 3, 4)]


def test_a_log_on_a_full_disk_is_one_line(tmp_path):
    log = TrainingLog(tmp_path / "log.jsonl", start=0, total=2, samples_per_step=1, accelerator=Accelerator(cpu=True))
    log.file.close()
    log.file = open("/dev/full", "a")  # noqa: SIM115 - the log closes it
    with pytest.raises(UserError, match=r"log.jsonl can't be written \(No space left on device\)"):
        log.step(1, loss=1.0, lr=0.1)
    log.close()
