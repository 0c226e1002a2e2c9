"""What a trainer watches: a progress bar, `log.jsonl` with one line a step, and the trackers asked for."""

import json
import logging
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from tqdm import tqdm

from library.experiment import writing
from library.files import write_text

log = logging.getLogger(__name__)


class TrainingLog:
    """Progress bar, JSON lines and trackers; silent on every process but the main one."""

    def __init__(self, path: Path, *, accelerator: Accelerator, start: int, total: int, samples_per_step: int) -> None:
        """Open the log; lines of steps after `start`, which an interrupted run had written, are taken out."""
        self.path = path
        self.accelerator = accelerator
        self.active = active = accelerator.is_main_process
        self.samples_per_step = samples_per_step
        self.last = time.perf_counter()
        if active:
            with writing(path, experiment=path.parent):
                _forget_after(path, start)
                self.file = path.open("a", encoding="utf-8")
        self.bar = tqdm(
            total=total, initial=start, unit="step", disable=not active, dynamic_ncols=True, mininterval=1.0
        )

    def step(self, step: int, **values: float) -> None:
        """Note one optimizer step."""
        now = time.perf_counter()
        rate = self.samples_per_step / max(now - self.last, 1e-9)
        self.last = now
        shown = {"loss": f"{values['loss']:.4f}", "lr": f"{values['lr']:.2e}", "samples/s": f"{rate:.2f}"}
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update()
        self.note(step=step, **values, samples_per_second=round(rate, 2))

    def note(self, *, step: int, **values: Any) -> None:
        """Write one line of any content, which also goes to the trackers; nothing if there is none."""
        if not values:
            return
        if self.active:
            with writing(self.path, experiment=self.path.parent):
                self.file.write(json.dumps({"step": step, **values}) + "\n")
                self.file.flush()
        self.accelerator.log(values, step=step)

    def pause(self) -> None:
        """Leave what was done since the last step (previews, saving) out of the next step's rate."""
        self.last = time.perf_counter()

    def close(self) -> None:
        """Close bar and file."""
        self.bar.close()
        if self.active:
            with suppress(OSError):  # of a line that couldn't be written, which has been told
                self.file.close()


def _forget_after(path: Path, step: int) -> None:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line).get("step", 0) <= step and step > 0:
                kept.append(line)
        except ValueError:  # the last line of a killed run
            continue
    write_text(path, "".join(f"{line}\n" for line in kept))
