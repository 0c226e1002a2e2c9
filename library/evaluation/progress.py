"""Lines that say how far a long evaluation is and how long it will still take."""

import logging
import time
from dataclasses import dataclass, field

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Progress:
    """Counts work done against work to do and logs a line at most every `every` seconds.

    The unit of work is one call of the transformer for one sample; everything else is told in about as many of them.
    """

    total: float
    every: float = 10.0
    done: float = 0.0
    stage: str = ""
    _start: float = field(default_factory=time.monotonic)
    _spoke: float = field(default_factory=time.monotonic)

    def begin(self, stage: str) -> None:
        """Name what is done from now on."""
        self.stage = stage

    def advance(self, work: float) -> None:
        """Count finished work."""
        self.done += work
        now = time.monotonic()
        if now - self._spoke >= self.every and 0 < self.done < self.total:
            self._spoke = now
            left = (now - self._start) * (self.total - self.done) / self.done
            logger.info(
                "%s: %.0f %% of everything, about %s left", self.stage, 100 * self.done / self.total, _time(left)
            )


def _time(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds >= 90 else f"{seconds:.0f} s"
