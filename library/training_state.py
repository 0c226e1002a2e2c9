"""What resuming needs, as safetensors and JSON: add-ons in float32, their running average, optimizer and schedule.

No random state is kept: all randomness of training is a function of seed, step and index (`library.randomness`).
A state is a folder `state_step_00000008`; it gets this name only when it is whole.
"""

import json
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
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from library.errors import UserError
from library.files import save_tensors, write_json
from library.fused_backward import WeightByWeight

_NAME = re.compile(r"state_step_(\d+)$")
_NEWEST = "latest"


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """The parts of a training run that change from step to step; tensors are the live ones, by parameter name."""

    parameters: Mapping[str, Tensor]
    average: Mapping[str, Tensor] | None
    optimizer: Optimizer | WeightByWeight
    scheduler: LRScheduler


def save_state(
    folder: Path, progress: Progress, *, step: int, recipe: Mapping[str, Any], keep: int | None = None
) -> Path:
    """Write `folder/state_step_N` and return its path; `recipe` is what must be the same on resuming.

    With `keep`, older states beyond the newest `keep` are deleted, after the new one is in place.
    """
    final = folder / f"state_step_{step:08d}"
    building = folder / f".{final.name}.{os.getpid()}.tmp"
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    try:
        save_tensors(building / "addons.safetensors", progress.parameters)
        if progress.average is not None:
            save_tensors(building / "average.safetensors", progress.average)
        tensors, plain = _optimizer_to_files(progress.optimizer, names=list(progress.parameters))
        save_tensors(building / "optimizer.safetensors", tensors)
        state = {"step": step, "recipe": recipe, "optimizer": plain, "scheduler": _plain_scheduler(progress.scheduler)}
        write_json(building / "state.json", state)
        if final.exists():
            shutil.rmtree(final)
        os.replace(building, final)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    if keep is not None:
        for _, old in list_states(folder)[:-keep]:
            shutil.rmtree(old)
    return final


def list_states(folder: Path) -> list[tuple[int, Path]]:
    """Whole states below `folder`, oldest first, with their steps."""
    if not folder.is_dir():
        return []
    found = ((_NAME.fullmatch(path.name), path) for path in folder.iterdir())
    return sorted((int(match[1]), path) for match, path in found if match and (path / "state.json").is_file())


def find_state(resume: str, *, experiment: Path) -> Path | None:
    """Return the state `--resume` means; None for `latest` where there is none yet.

    Raises:
        UserError: the path is no state.
    """
    if resume == _NEWEST:
        states = list_states(experiment)
        return states[-1][1] if states else None
    path = Path(resume)
    if not (path / "state.json").is_file():
        raise UserError(f"--resume {resume}: is no state folder (no state.json); give a state_step_N folder or latest")
    return path


def load_state(path: Path, progress: Progress, *, recipe: Mapping[str, Any]) -> int:
    """Put a saved state into the live objects and return its step.

    Raises:
        UserError: the state is damaged, or was made with another recipe; the first difference is named.
    """
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        files = {name: load_file(path / f"{name}.safetensors") for name in ("addons", "optimizer")}
        if progress.average is not None:
            files["average"] = load_file(path / "average.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"--resume {path}: damaged ({error}); resume from an earlier state") from None
    for key, value in json.loads(json.dumps(recipe)).items():
        if state["recipe"].get(key) != value:
            raise UserError(f"--{key} {value}: the state {path} was made with {state['recipe'].get(key)}; use the same")
    _copy_into(progress.parameters, files["addons"], path=path)
    if progress.average is not None:
        _copy_into(progress.average, files["average"], path=path)
    names = list(progress.parameters)
    progress.optimizer.load_state_dict(_optimizer_from_files(files["optimizer"], state["optimizer"], names=names))
    progress.scheduler.load_state_dict(state["scheduler"])
    return int(state["step"])


@torch.no_grad()
def _copy_into(live: Mapping[str, Tensor], saved: Mapping[str, Tensor], *, path: Path) -> None:
    if live.keys() != saved.keys():
        odd = sorted(live.keys() ^ saved.keys())
        raise UserError(f"--resume {path}: its add-ons aren't those of this model ({odd[0]}, ...); use the same flags")
    for name, tensor in live.items():
        if tensor.shape != saved[name].shape:
            raise UserError(f"--resume {path}: {name} has another shape; use the same base and ranks")
        tensor.copy_(saved[name])


def _optimizer_to_files(
    optimizer: Optimizer | WeightByWeight, *, names: list[str]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
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
                tensors[f"{names[index]}/{key}"] = value.clone() if value.data_ptr() in seen else value
                seen.add(value.data_ptr())
            else:
                values.setdefault(names[index], {})[key] = value
    return tensors, {"values": values, "groups": state["param_groups"]}


def _optimizer_from_files(
    tensors: Mapping[str, Tensor], plain: Mapping[str, Any], *, names: list[str]
) -> dict[str, Any]:
    index = {name: number for number, name in enumerate(names)}
    state: dict[int, dict[str, Any]] = {}
    for joined, tensor in tensors.items():
        name, _, key = joined.rpartition("/")
        state.setdefault(index[name], {})[key] = tensor
    for name, entries in plain["values"].items():
        state.setdefault(index[name], {}).update(entries)
    return {"state": state, "param_groups": plain["groups"]}


def _plain_scheduler(scheduler: LRScheduler) -> dict[str, Any]:
    """The schedule's position; its functions are made anew from the flags."""
    return {key: value for key, value in scheduler.state_dict().items() if key != "lr_lambdas"} | {"lr_lambdas": [None]}
