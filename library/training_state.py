"""What resuming needs, as safetensors and JSON: add-ons as held, their running average, optimizer and schedule.

No random state is kept: all randomness of training is a function of seed, step and index (`library.randomness`).
A state is a folder `state_step_00000008`; it gets this name only when it is whole.
"""

import json
import logging
import os
import re
import shutil
from collections import ChainMap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.amp import GradScaler
from torch.optim.lr_scheduler import LRScheduler

from library.errors import UserError
from library.files import flush_to_disk, save_tensors, write_json
from library.gradients import Stateful
from library.sharding import gathered, own_part, shared_like

log = logging.getLogger(__name__)

_NAME = re.compile(r"state_step_(\d+)$")
LATEST = "latest"


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """The parts of a training run that change from step to step; tensors are the live ones, by parameter name."""

    parameters: Mapping[str, Tensor]
    average: Mapping[str, Tensor] | None
    optimizer: Stateful
    scheduler: LRScheduler
    scaler: GradScaler | None = None  # of fp16


def state_path(folder: Path, step: int) -> Path:
    """Path of the state of a step."""
    return folder / f"state_step_{step:08d}"


def save_state(
    folder: Path,
    progress: Progress,
    *,
    step: int,
    recipe: Mapping[str, Any],
    keep: int | None = None,
    writes: bool = True,
) -> Path:
    """Write `folder/state_step_N` and return its path; `recipe` is what must be the same on resuming.

    A whole state of this step is left as it is: a run reaches a step in one way only. With `keep`, states before the
    newest `keep` are deleted, after the new one is on the disk; states of later steps aren't this run's and stay.
    Where processes share the model or the optimizer, all must call this, and one `writes`.
    """
    final = state_path(folder, step)
    if (final / "state.json").is_file():
        return final
    tensors, plain = _optimizer_to_files(progress.optimizer, names=list(progress.parameters))
    files = {"addons": progress.parameters, "average": progress.average or {}, "optimizer": tensors}
    together = {name: gathered(tensors, keep=writes) for name, tensors in files.items()}
    if not writes:
        return final
    state = {"step": step, "recipe": recipe, "optimizer": plain, "scheduler": _plain_scheduler(progress.scheduler)}
    if progress.scaler is not None:
        state["scaler"] = progress.scaler.state_dict()
    building = _temporary(final)
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    try:
        for name, tensors in together.items():
            if name != "average" or progress.average is not None:
                save_tensors(building / f"{name}.safetensors", tensors, durable=True)
        write_json(building / "state.json", state, durable=True)
        shutil.rmtree(final, ignore_errors=True)  # the rest of one whose deletion was interrupted
        os.replace(building, final)
        flush_to_disk(folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    if keep is not None:
        for _, old in [state for state in list_states(folder) if state[0] <= step][:-keep]:
            os.replace(old, _temporary(old))  # at no instant is there half a state under a state's name
            shutil.rmtree(_temporary(old))
    return final


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def list_states(folder: Path) -> list[tuple[int, Path]]:
    """Whole states below `folder`, oldest first, with their steps."""
    if not folder.is_dir():
        return []
    found = ((_NAME.fullmatch(path.name), path) for path in folder.iterdir())
    return sorted((int(match[1]), path) for match, path in found if match and (path / "state.json").is_file())


def resume_state(resume: str, progress: Progress, *, experiment: Path, recipe: Mapping[str, Any]) -> int:
    """Put the state that `--resume` means into the live objects and return its step; 0 for `latest` without any.

    For `latest` a damaged state is named in a warning, and the one before it is taken.

    Raises:
        UserError: the path is no state, or no state is whole, or it was made with another recipe.
    """
    if resume == LATEST:
        candidates = [path for _, path in reversed(list_states(experiment))]
    else:
        candidates = [Path(resume)]
        if not (candidates[0] / "state.json").is_file():
            raise UserError(
                f"--resume {resume}: is no state folder (no state.json); give a state_step_N folder or latest"
            )
    for number, path in enumerate(candidates):
        try:
            step = load_state(path, progress, recipe=recipe)
        except DamagedState as error:
            if number + 1 == len(candidates):
                raise
            log.warning("%s; taking %s", error, candidates[number + 1].name)
        else:
            log.info("Resumed %s at step %d", path, step)
            return step
    log.info("--resume latest: no state in %s yet; starting at step 0", experiment)
    return 0


def set_aside_later(folder: Path, step: int) -> None:
    """Rename states of steps after `step`: they are damaged or left behind, and shall not be taken for this run's."""
    for number, path in list_states(folder):
        if number > step:
            aside = path.with_name(f"set_aside_{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(path, aside)
            log.warning("%s is later than the state resumed from; it is now %s: delete it when done", path, aside.name)


class DamagedState(UserError):
    """A state that can't be read."""


def load_state(path: Path, progress: Progress, *, recipe: Mapping[str, Any]) -> int:
    """Put a saved state into the live objects and return its step.

    Raises:
        DamagedState: a file is missing or not whole; nothing is changed then.
        UserError: the state was made with another recipe; all differences are named.
    """
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        made_with = state["recipe"]
        files = {name: load_file(path / f"{name}.safetensors") for name in ("addons", "optimizer")}
        if progress.average is not None and made_with.get("ema_decay") == recipe.get("ema_decay"):
            files["average"] = load_file(path / "average.safetensors")
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise DamagedState(f"--resume {path}: damaged ({error}); resume from an earlier state") from None
    now = json.loads(json.dumps(recipe))
    changed = [
        f"--{key} {made_with.get(key)} (now {value})"
        for key, value in now.items()
        if made_with.get(key) != value and (key in made_with or _is_on(value))  # what a state doesn't know was off then
    ]
    if changed:
        raise UserError(f"--resume {path}: made with {', '.join(changed)}; use the same to go on")
    _copy_into(progress.parameters, files["addons"], path=path)
    if progress.average is not None:
        _copy_into(progress.average, files["average"], path=path)
    optimizer = _optimizer_from_files(files["optimizer"], state["optimizer"], live=progress.parameters)
    progress.optimizer.load_state_dict(optimizer)
    progress.scheduler.load_state_dict(state["scheduler"])
    if progress.scaler is not None and "scaler" in state:
        progress.scaler.load_state_dict(state["scaler"])
    return int(state["step"])


def _is_on(value: Any) -> bool:
    """Whether a flag's value asks for something; what is in brackets is no value but a fact about one."""
    return bool(value) and not str(value).startswith("(")


@torch.no_grad()
def _copy_into(live: Mapping[str, Tensor], saved: Mapping[str, Tensor], *, path: Path) -> None:
    if live.keys() != saved.keys():
        odd = sorted(live.keys() ^ saved.keys())
        raise UserError(f"--resume {path}: its add-ons aren't those of this model ({odd[0]}, ...); use the same flags")
    for name, tensor in live.items():
        if tensor.shape != saved[name].shape:
            raise UserError(f"--resume {path}: {name} has another shape; use the same base and ranks")
        tensor.copy_(shared_like(saved[name], tensor))


def _optimizer_to_files(optimizer: Stateful, *, names: list[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split an optimizer's state into tensors, named PARAMETER/KEY, and what JSON can hold."""
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    seen: set[int] = set()
    for index, entries in state["state"].items():
        nested = [value for value in entries.values() if isinstance(value, dict)]  # bitsandbytes' 8 bits
        plain = {key: value for key, value in entries.items() if not isinstance(value, dict)}
        for key, value in ChainMap(plain, *nested).items():
            if isinstance(value, Tensor):
                # bitsandbytes gives all parameters one table; a file can't hold a tensor twice.
                place = own_part(value).data_ptr()
                tensors[f"{names[index]}/{key}"] = value.clone() if place in seen else value
                seen.add(place)
            else:
                values.setdefault(names[index], {})[key] = value
    return tensors, {"values": values, "groups": state["param_groups"]}


def _optimizer_from_files(
    tensors: Mapping[str, Tensor], plain: Mapping[str, Any], *, live: Mapping[str, Tensor]
) -> dict[str, Any]:
    index = {name: number for number, name in enumerate(live)}
    state: dict[int, dict[str, Any]] = {}
    for joined, tensor in tensors.items():
        name, _, key = joined.rpartition("/")
        state.setdefault(index[name], {})[key] = shared_like(tensor, live[name])
    for name, entries in plain["values"].items():
        state.setdefault(index[name], {}).update(entries)
    return {"state": state, "param_groups": plain["groups"]}


def _plain_scheduler(scheduler: LRScheduler) -> dict[str, Any]:
    """The schedule's position; its functions are made anew from the flags."""
    return {key: value for key, value in scheduler.state_dict().items() if key != "lr_lambdas"} | {"lr_lambdas": [None]}
