"""Stops a run whose loss isn't a number any more, or explodes."""

import math
from collections import deque

WINDOW = 100  # steps of the running mean
WARM_UP = 20  # steps before it is trusted


class LossGuard:
    """Compares each step's loss with the mean of the steps before; with `factor` 0 it only has to be a number.

    It starts afresh when a run is resumed: it can end a run, but never change it.
    """

    def __init__(self, *, factor: float) -> None:
        self.factor = factor
        self.past: deque[float] = deque(maxlen=WINDOW)

    def fault(self, loss: float) -> str | None:
        """Take in one step's loss; return what is wrong with it, as the rest of a sentence, or None."""
        if not math.isfinite(loss):
            return f"is {loss}"
        mean = sum(self.past) / max(len(self.past), 1)
        if self.factor and len(self.past) >= WARM_UP and loss > self.factor * mean:
            return f"is {loss:.4g}, {loss / mean:.1f} times the mean {mean:.4g} of the last {len(self.past)} steps"
        self.past.append(loss)
        return None
