"""Experiment trackers through accelerate, beside the log that is always written."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, filter_trackers, get_available_trackers
from accelerate.utils import LoggerType

from library.errors import UserError

TRACKERS = tuple(sorted(LOGGER_TYPE_TO_CLASS))


def start_trackers(
    accelerator: Accelerator, names: Sequence[str], *, folder: Path, run: str, facts: Mapping[str, Any]
) -> None:
    """Let `accelerator.log` write to the trackers `names`; `facts` are shown as the run's settings.

    Raises:
        UserError: a tracker's package isn't installed.
    """
    for name in names:
        if LoggerType(name) not in get_available_trackers():
            raise UserError(
                f"--log_with {name}: its package isn't installed; install it (tensorboard: pip install "
                "-e '.[train]'), or leave the flag away: log.jsonl is always written"
            )
    accelerator.project_configuration.set_directories(str(folder))
    accelerator.log_with = filter_trackers(list(names), str(folder))
    settings = {
        key: value if isinstance(value, bool | int | float | str) else str(value) for key, value in facts.items()
    }
    accelerator.init_trackers(run, config=settings)


def finish_trackers(accelerator: Accelerator) -> None:
    """Let the trackers write what they hold back."""
    for tracker in accelerator.trackers:
        tracker.finish()
