"""Training at its edges: datasets of odd sizes, wrong files, folders that can't be used, losses that explode."""

import json
import os
import signal
import struct
from pathlib import Path

import pytest
from fake_folder import write_base, write_cache
from small_training import addons, lines, prepare, run

import library.training_watch
from library.errors import UserError
from library.experiment import LOCK, open_experiment
from library.flux.checkpoint import open_checkpoint
from library.jointdit.attention import WEIGHTINGS
from library.loss_guard import WARM_UP, LossGuard
from library.preview import Previewer
from library.training import Trainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("limits"))


def test_an_empty_dataset_is_one_line(folder):
    with pytest.raises(UserError, match="--image_folder .*nothing: "):
        run(folder, "empty", "--image_folder", str(folder / "nothing"), "--max_train_steps", "1")


def test_one_sample_fills_every_batch(folder):
    write_cache(folder / "one", names=("alone",), autoencoder=folder / "ae.safetensors")
    more = ("--image_folder", str(folder / "one"), "--train_batch_size", "3", "--max_train_epochs", "2")
    experiment = run(folder, "one", *more)
    assert [line["step"] for line in lines(experiment)] == [1]  # two sights of it in one batch of three


def test_a_batch_may_be_larger_than_the_dataset(folder):
    write_cache(folder / "three", names=("a", "b", "c"), autoencoder=folder / "ae.safetensors")
    more = ("--image_folder", str(folder / "three"), "--max_train_steps", "2")
    large = run(folder, "large", *more, "--train_batch_size", "4")
    parts = run(folder, "parts", *more, "--train_batch_size", "2", "--gradient_accumulation_steps", "2")
    for one, other in zip(lines(large), lines(parts), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)


def test_addons_and_states_of_another_base_are_refused(folder):
    first = run(folder, "base", "--max_train_steps", "1", "--save_state")
    other = folder / "other.safetensors"
    write_base(other)
    with other.open("r+b") as file:
        (header,) = struct.unpack("<Q", file.read(8))
        place = json.loads(file.read(header))["img_in.weight"]["data_offsets"][0]
        file.seek(8 + header + place)
        file.write(struct.pack("<f", 3.0))
    more = ("--pretrained_model_name_or_path", str(other), "--max_train_steps", "2")
    with pytest.raises(UserError, match="made for another backbone than .* its fingerprint differs"):
        run(folder, "tuned", *more, "--jointdit_addons_path", str(first / "jointdit_addons.safetensors"))
    with pytest.raises(UserError, match=r"made with --pretrained_model_name_or_path \(fingerprint \w+\) \(now "):
        run(folder, "base", *more, "--resume", "latest")


def test_a_cache_made_anew_in_another_way_is_named_wherever_it_lies(folder):
    def write(name, **made_with):
        write_cache(folder / name, autoencoder=folder / "ae.safetensors", posterior="sample", **made_with)
        return ("--image_folder", str(folder / name), "--save_state", "--resume", "latest", "--max_train_steps")

    experiment = run(folder, "cached", *write("first", seed=42), "1")
    whole = addons(run(folder, "cached_once", "--max_train_steps", "2"))
    assert addons(run(folder, "cached", *write("moved", seed=42), "2")) == whole
    with pytest.raises(UserError, match=r"--image_folder's cache \(.*posterior sample, seed 42\) \(now .*seed 7\)\)"):
        run(folder, "cached", *write("moved", seed=7), "3")
    for state in experiment.glob("state_step_*/state.json"):  # as states were before caches were told
        content = json.loads(state.read_text())
        del content["recipe"]["image_folder's cache"]
        state.write_text(json.dumps(content))
    run(folder, "cached", *write("moved", seed=7), "3")


def test_an_unusable_folder_is_one_line(folder):
    (folder / "a_file").write_text("")
    with pytest.raises(UserError, match=r"--output_dir .*\(Not a directory\); there is no .*, and begin anew$"):
        run(folder, "x", "--output_dir", str(folder / "a_file"), "--max_train_steps", "1")


def test_a_full_disk_names_the_last_state(folder, monkeypatch):
    more = ("--save_state", "--save_every_n_steps", "1", "--resume", "latest")
    experiment = run(folder, "full", *more, "--max_train_steps", "2")
    before = {path: path.read_bytes() for path in experiment.rglob("*") if path.is_file()}

    for what in ("jointdit_addons_step_000003.safetensors", "state_step_00000003"):

        def full(descriptor, name=f".{Path(what).stem}"):
            if name in os.readlink(f"/proc/self/fd/{descriptor}"):
                raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr("os.fsync", full)
            with pytest.raises(UserError, match=rf"{what} can't be written \(No space left on device\); the new"):
                run(folder, "full", *more, "--max_train_steps", "3")
    for path, content in before.items():
        assert path.name in ("log.jsonl", "jointdit_addons.safetensors") or path.read_bytes() == content
    assert not list(experiment.glob(".*")) and not (experiment / "state_step_00000003").exists()
    whole = run(folder, "room", "--max_train_steps", "3")
    assert addons(run(folder, "full", *more, "--max_train_steps", "3")) == addons(whole)


def test_what_is_saved_would_survive_a_power_cut(folder, monkeypatch):
    done = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(descriptor):
        fsync(descriptor)
        done.append(("flushed", os.readlink(f"/proc/self/fd/{descriptor}")))

    def noted_replace(source, target):
        replace(source, target)
        done.append(("named", str(source), str(target)))

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    experiment = run(folder, "durable", "--max_train_steps", "1", "--save_every_n_steps", "1", "--save_state")
    named = {}
    for number, (what, *paths) in enumerate(done):
        if what == "named" and Path(paths[1]).is_relative_to(experiment):  # others can be made again, as the index
            source, target = paths
            named[target] = (done[number - 1], done[number + 1])
            assert named[target] == (("flushed", source), ("flushed", os.path.dirname(target)))
    names = ("jointdit_addons", "jointdit_addons_step_000001")
    files = {str(experiment / f"{name}.{ending}") for name in names for ending in ("safetensors", "json")}
    assert files | {str(experiment / "state_step_00000001")} <= set(named)


def test_a_folder_with_states_is_not_taken_for_a_new_run(folder):
    run(folder, "taken", "--max_train_steps", "1", "--save_state")
    with pytest.raises(UserError, match="has state_step_00000001 of an earlier run; give --resume .* --exp_name$"):
        run(folder, "taken", "--max_train_steps", "1", "--save_state")


def test_addons_of_an_earlier_run_are_not_mixed_with_new_ones(folder):
    run(folder, "made", "--max_train_steps", "2", "--save_every_n_steps", "1")
    with pytest.raises(UserError, match="--exp_name made: .* has jointdit_addons_step_000002.safetensors of an earl"):
        run(folder, "made", "--max_train_steps", "1")
    with pytest.raises(UserError, match="--exp_name made: .* has jointdit_addons.safetensors of an earlier run, and"):
        run(folder, "made", "--max_train_steps", "3", "--resume", "latest")
    assert len(lines(folder / "experiments" / "made")) == 2 and not (folder / "experiments" / "made" / LOCK).exists()


def test_left_overs_of_killed_runs_are_removed(tmp_path):
    (tmp_path / ".state_step_00000004.123.tmp").mkdir()
    (tmp_path / ".state_step_00000004.123.tmp" / "addons.safetensors").write_text("half")
    (tmp_path / "sample" / "steps_0").mkdir(parents=True)
    (tmp_path / "sample" / "steps_0" / ".prompt_00001.77.tmp.png").write_text("half")
    (tmp_path / ".tmpOIpDVV").write_text("half an add-ons file, as safetensors names it")
    (tmp_path / ".jointdit_addons.88.tmp.safetensors").write_text("half")
    (tmp_path / ".mine").write_text("kept")
    with open_experiment(tmp_path, resume=False):
        assert {path.name for path in tmp_path.rglob(".*")} == {LOCK, ".mine"}
    assert {path.name for path in tmp_path.rglob(".*")} == {".mine"}


def test_what_is_not_a_number_stops_with_step_samples_and_state(folder, monkeypatch):
    more = ("--save_state", "--save_every_n_steps", "1", "--max_train_steps", "4", "--resume", "latest")
    plain = Trainer.micro_loss

    def broken(self, batch, *, step, part):
        return plain(self, batch, step=step, part=part) * (float("nan") if step == 2 else 1)

    monkeypatch.setattr(Trainer, "micro_loss", broken)
    where = r"--learning_rate .*the loss of step 3 is nan \(samples \w+\); the newest state is .*_00000002; .*latest$"
    with pytest.raises(UserError, match=where):
        run(folder, "broken", *more)
    monkeypatch.setattr(Trainer, "micro_loss", plain)
    assert addons(run(folder, "broken", *more)) == addons(run(folder, "sound", "--max_train_steps", "4"))


def test_broken_weights_are_never_saved(folder, monkeypatch):
    plain = Trainer.optimize

    def overflow(self, batches, step):
        numbers = plain(self, batches, step)
        next(iter(self.trained.values())).data.fill_(float("inf"))
        return numbers

    monkeypatch.setattr(Trainer, "optimize", overflow)
    with pytest.raises(UserError, match=r"\S+.lora_A.weight isn't finite .*; there is no state in .* begin anew$"):
        run(folder, "overflow", "--max_train_steps", "2", "--save_state", "--save_every_n_steps", "1")


def test_the_guard_knows_explosions_from_noise():
    guard = LossGuard(factor=10)
    for step in range(WARM_UP):
        assert guard.fault(100.0 if step == 0 else 1.0) is None
    assert guard.fault(9.0) is None
    fault = guard.fault(1000.0)
    assert fault is not None and fault.startswith("is 1000, ") and "times the mean" in fault
    assert guard.fault(float("inf")) == "is inf"
    assert all(LossGuard(factor=0).fault(10.0**step) is None for step in range(30))


@pytest.mark.parametrize("weighting", [*WEIGHTINGS])
def test_ablations_are_recorded_and_shown(folder, weighting, caplog):
    caplog.set_level("INFO", "library")
    experiment = run(
        folder, f"ablation_{weighting}", "--max_train_steps", "1", "--weighting", weighting, "--timestep_sampling",
        "uniform", "--no_unbalanced_sampling", "--lora_rank", "3", "--text_dropout", "0.25",
    )  # fmt: skip
    header = open_checkpoint(experiment / "jointdit_addons.safetensors", flag="--x", model_types=()).header
    assert header["weighting"] == weighting and header["ranks"]["blocks"] == 3
    recipe = header["recipe"]
    assert (recipe["timestep_sampling"], recipe["unbalanced_sampling"], recipe["text_dropout"]) == (
        "uniform",
        False,
        0.25,
    )
    (method,) = [message for message in caplog.messages if message.startswith("Method: ")]
    for said in ("uniform", "unbalanced sampling off", f"connection: {weighting};", "dropout 0.25", "ranks 3 "):
        assert said in method


def test_a_stop_request_ends_previews_too(folder, monkeypatch, caplog):
    plain = Previewer.prompt_sheet

    def stopped(self, model, number):
        os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, model, number)

    monkeypatch.setattr(Previewer, "prompt_sheet", stopped)
    experiment = run(
        folder, "previewed", "--max_train_steps", "3", "--sample_every_n_steps", "2", "--sample_steps", "1", "--ae",
        str(folder / "ae.safetensors"),
    )  # fmt: skip
    assert "Previews of step 2 are left unfinished: asked to stop" in caplog.messages
    assert [path.name for path in (experiment / "sample" / "steps_2").glob("*.png")] == ["prompt_00001.png"]
    assert (experiment / "state_step_00000002").is_dir() and not (experiment / "jointdit_addons.safetensors").exists()


def test_a_stop_request_ends_validation_too(folder, monkeypatch, caplog):
    plain = library.training_watch.validation_loss

    def stopped(model, batches, *, guidance):
        os.kill(os.getpid(), signal.SIGTERM)
        return plain(model, batches, guidance=guidance)

    monkeypatch.setattr("library.training_watch.validation_loss", stopped)
    experiment = run(
        folder, "validated", "--max_train_steps", "3", "--val_every_n_steps", "2", "--validation_folder",
        str(folder / "held_out"),
    )  # fmt: skip
    assert "Validation of step 2 is left unfinished: asked to stop" in caplog.messages
    assert [line["step"] for line in lines(experiment)] == [1, 2]
    assert (experiment / "state_step_00000002").is_dir()


def test_damaged_held_out_samples_are_found_at_the_start(folder, tmp_path, caplog):
    damaged = write_cache(tmp_path, autoencoder=folder / "ae.safetensors").cached("00000001")
    damaged.write_bytes(b"nothing")
    more = ("--max_train_steps", "2", "--val_every_n_steps", "2", "--validation_folder", str(tmp_path))
    with pytest.raises(UserError, match=r"--validation_folder .*00000001\.safetensors: damaged"):
        run(folder, "held_out_damaged", *more)
    assert lines(run(folder, "held_out_damaged", *more, "--max_bad_samples", "1"))[-1]["val_depth_estimation"] > 0
    assert sum("left out: --validation_folder" in message for message in caplog.messages) == 1


def test_a_fault_of_the_previews_costs_no_state(folder, monkeypatch):
    monkeypatch.setattr(Previewer, "prompt_sheet", lambda *_: 1 / 0)
    more = ("--max_train_steps", "4", "--sample_every_n_steps", "2", "--ae", str(folder / "ae.safetensors"))
    with pytest.raises(ZeroDivisionError):
        run(folder, "fault", *more, "--save_state", "--save_every_n_steps", "2")
    assert (folder / "experiments" / "fault" / "state_step_00000002").is_dir()


def test_addons_of_the_steps_between_are_bounded(folder):
    more = ("--save_every_n_steps", "1", "--save_last_n_addons", "2", "--max_train_steps", "4")
    experiment = run(folder, "bounded", *more)
    names = {path.name for path in experiment.iterdir() if path.suffix in (".safetensors", ".json")}
    kept = ("jointdit_addons_step_000003", "jointdit_addons_step_000004", "jointdit_addons")
    assert names == {f"{name}.{ending}" for name in kept for ending in ("safetensors", "json")}


def test_a_damaged_newest_state_costs_its_steps_only(folder, caplog):
    more = (
        "--save_state",
        "--save_every_n_steps",
        "1",
        "--save_last_n",
        "2",
        "--resume",
        "latest",
        "--ema_decay",
        "0.9",
    )
    experiment = run(folder, "damaged", *more, "--max_train_steps", "3")
    newest = experiment / "state_step_00000003"
    (newest / "optimizer.safetensors").write_bytes((newest / "optimizer.safetensors").read_bytes()[:1000])
    run(folder, "damaged", *more, "--max_train_steps", "4")
    assert any(f"--resume {newest}: damaged" in message for message in caplog.messages)
    assert (experiment / "set_aside_state_step_00000003").is_dir()
    whole = run(folder, "undamaged", "--max_train_steps", "4", "--ema_decay", "0.9")
    assert addons(experiment) == addons(whole)
    assert [line["step"] for line in lines(experiment)] == [1, 2, 3, 4]


@pytest.mark.parametrize(("flag", "asked", "end"), [("steps", 1, 1), ("epochs", 1, 8)])
def test_an_end_before_the_state_is_refused(folder, flag, asked, end):
    name = f"past_{flag}"
    run(folder, name, "--save_state", "--max_train_steps", str(end + 1))
    with pytest.raises(UserError, match=rf"--max_train_{flag} {asked}: ends at step {end}, and --resume latest is at "):
        run(folder, name, "--save_state", "--resume", "latest", f"--max_train_{flag}", str(asked))


def test_states_can_be_resumed_elsewhere(folder):
    source = run(folder, "source", "--save_state", "--max_train_steps", "2")
    other = run(folder, "elsewhere", "--save_state", "--max_train_steps", "2", "--text_dropout", "1")
    state = source / "state_step_00000002"
    run(folder, "elsewhere", "--save_state", "--max_train_steps", "3", "--resume", str(state))
    assert addons(other) == addons(run(folder, "straight", "--max_train_steps", "3"))
    assert {path.name for path in other.glob("*state*")} == {"set_aside_state_step_00000002", "state_step_00000003"}
