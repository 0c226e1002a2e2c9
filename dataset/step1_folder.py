"""A prepared folder while step 1 runs: held by one run, shared by its processes, cleaned of what a killed run left."""

import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch import distributed

from dataset.layout import DEPTHMAPS, PROCESSED_IMAGES, Layout
from library.cli import is_main_process, process_count
from library.errors import UserError
from library.files import TEMPORARY, write_json

_COPY = re.compile(r"\.copy\.\d+\.tmp")  # as `dataset.intake` does; what else is hidden there is the user's
_REPORT = re.compile(r"\.step1\.\d+\.tmp\.jsonl?")
_LONGEST_WAIT = timedelta(days=30)  # for a process that still makes captions


@contextmanager
def hold_folder(layout: Layout) -> Iterator[None]:
    """Keep other runs of this step out of the folder; the system lets go of it by itself if this process is killed.

    Raises:
        UserError: another run is at work in it.
    """
    if not is_main_process():
        yield
        return
    folder = os.open(layout.root, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"--image_folder {layout.root}: another run of this step is at work in it") from None
    except OSError:
        pass  # some network file systems have no locks
    try:
        yield
    finally:
        os.close(folder)


def claim_sizes(layout: Layout, flags: dict[str, Any]) -> None:
    """Write down the flags that decide the pictures' sizes, or check that an earlier run had the same.

    Raises:
        UserError: it had others; a half of the pictures would have other sizes than the rest.
    """
    path = layout.step1_settings
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        write_json(path, flags)
        return
    except (OSError, ValueError) as error:
        raise UserError(f"--image_folder {path}: can't be read ({error}); remove this file") from None
    for name, value in flags.items():
        if found.get(name) != value:
            raise UserError(
                f"--{name} {value}: the pictures in {layout.processed_images} were made with {found.get(name)}; use "
                f"the same, or begin anew by removing {path.name} and the folders {PROCESSED_IMAGES} and {DEPTHMAPS}"
            )


def remove_leftovers(layout: Layout) -> None:
    """Remove files that a killed process had begun: temporary ones and parts of the report."""
    ours = (layout.processed_images, layout.depthmaps, layout.text_prompts)
    for folder, pattern in (*((folder, TEMPORARY) for folder in ours), (layout.raw_images, _COPY)):
        for path, _, names in os.walk(folder):
            for name in filter(pattern.fullmatch, names):
                os.unlink(os.path.join(path, name))
    for entry in Path(layout.root).iterdir():
        if _REPORT.fullmatch(entry.name):
            entry.unlink()
    shutil.rmtree(layout.step1_parts, ignore_errors=True)


def wait_for_all() -> None:
    """Wait until all processes are here."""
    if process_count() > 1:
        if not distributed.is_initialized():
            distributed.init_process_group("gloo", timeout=_LONGEST_WAIT)
        distributed.barrier()
