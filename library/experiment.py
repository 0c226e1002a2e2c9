"""An experiment's folder: one run at a time, no left-overs of killed runs, and failed writes told in one line."""

import fcntl
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from library.errors import UserError
from library.files import is_left_over
from library.training_state import list_states

log = logging.getLogger(__name__)

LOCK = ".lock"
STEP_ADDONS = "jointdit_addons_step_"  # and the step: add-ons of the steps between


@contextmanager
def open_experiment(folder: Path, *, resume: bool, main_process: bool = True) -> Iterator[None]:
    """Hold an experiment's folder for one run; on the main process make it, lock it and clean it up.

    Raises:
        UserError: it can't be written to, another run is in it, or it has states or add-ons that a run without
            `--resume` would mix with its own.
    """
    if not main_process:
        yield
        return
    lock = folder / LOCK
    with writing(lock, experiment=folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = lock.open("w")
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise UserError(
                f"--exp_name {folder.name}: another run is training in {folder}; wait for its end, or choose another "
                "name"
            ) from None
        try:
            refuse_earlier_runs(folder, resume=resume)
            yield
        finally:
            lock.unlink(missing_ok=True)


def refuse_earlier_runs(folder: Path, *, resume: bool) -> None:
    """Clean a folder up, and refuse one whose states or add-ons a run would mix with its own."""
    remove_left_overs(folder)
    states = list_states(folder)
    if states and not resume:
        raise UserError(
            f"--exp_name {folder.name}: {folder} has {states[-1][1].name} of an earlier run; give --resume latest "
            "to go on with it, or choose another --exp_name"
        )
    # Those of steps may be from a run that was killed before its first state: --resume begins that one anew.
    addons = [file.name for file in folder.glob("*.safetensors") if not (resume and STEP_ADDONS in file.name)]
    if addons and not states:
        raise UserError(
            f"--exp_name {folder.name}: {folder} has {max(addons)} of an earlier run, and no state to go on from; "
            "choose another --exp_name, or move that folder away"
        )


def remove_left_overs(folder: Path) -> None:
    """Delete the temporary files and folders of killed runs."""
    for path in sorted(folder.rglob(".*")):
        if is_left_over(path):
            log.info("Removing %s, left by a run that was killed", path)
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def newest_state(folder: Path) -> str:
    """Say which state of a folder is the newest."""
    states = list_states(folder)
    return f"the newest state is {states[-1][1]}" if states else f"there is no state in {folder} (see --save_state)"


def how_to_go_on(folder: Path) -> str:
    """Say how a run that ends here is taken up again."""
    return "go on with --resume latest" if list_states(folder) else "begin anew"


@contextmanager
def writing(path: Path, *, experiment: Path) -> Iterator[None]:
    """Turn a failed write of `path` (disk full, no permission) into one line that says what is still whole.

    Raises:
        UserError: in place of what the write raised.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise UserError(
            f"--output_dir {experiment.parent}: {path} can't be written ({reason}); {newest_state(experiment)}; "
            f"make room or choose another folder, and {how_to_go_on(experiment)}"
        ) from error
