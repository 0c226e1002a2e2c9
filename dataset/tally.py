"""What a look at many samples adds up to: counts, first names, ranges, sizes and content hashes, in bounded memory."""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

EXAMPLES = 3
"""Names kept of each finding."""
DIGEST = 16
"""Bytes of a content hash."""


@dataclass(kw_only=True, slots=True)
class Tally:
    """Sums over samples; `merge` joins those of consecutive parts in their order.

    Attributes:
        counts: how often each finding was made.
        examples: the first names of each finding, with what was said of them.
        ranges: smallest and largest value of each quantity.
        sizes: how many samples have each size.
        readable: how many samples of each bucket (see `library.data_order`) can be read, of "image" and "cached".
        digests: `DIGEST` bytes for each image in their order, to find equal files.
    """

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    ranges: dict[str, tuple[float, float]] = field(default_factory=dict)
    sizes: dict[str, Counter[str]] = field(default_factory=dict)
    readable: dict[str, Counter[int]] = field(default_factory=lambda: {"image": Counter(), "cached": Counter()})
    digests: bytearray = field(default_factory=bytearray)

    def note(self, finding: str, name: str, text: str = "") -> None:
        """Count a finding about the sample `name`."""
        self.counts[finding] += 1
        known = self.examples.setdefault(finding, [])
        if len(known) < EXAMPLES:
            known.append((name, text))

    def stretch(self, quantity: str, low: float, high: float) -> None:
        """Widen the range of a quantity."""
        known = self.ranges.get(quantity, (low, high))
        self.ranges[quantity] = min(known[0], low), max(known[1], high)

    def measure(self, quantity: str, size: tuple[int, ...]) -> None:
        """Count a size; pictures are width x height."""
        self.sizes.setdefault(quantity, Counter())[" x ".join(map(str, size))] += 1

    def merge(self, later: "Tally") -> None:
        """Add what was found in the samples that follow."""
        self.counts += later.counts
        for finding, names in later.examples.items():
            known = self.examples.setdefault(finding, [])
            known += names[: EXAMPLES - len(known)]
        for quantity, (low, high) in later.ranges.items():
            self.stretch(quantity, low, high)
        for quantity, sizes in later.sizes.items():
            self.sizes.setdefault(quantity, Counter()).update(sizes)
        for kind, buckets in later.readable.items():
            self.readable[kind].update(buckets)
        self.digests += later.digests


def find_equal(digests: bytes | bytearray) -> np.ndarray:
    """Return rows of (first, later) places of equal hashes, int64, each later place once and in rising order.

    10 M hashes take some 0.5 GB while they are sorted.
    """
    values = np.frombuffer(digests, dtype=np.dtype((np.void, DIGEST)))
    if not len(values):
        return np.empty((0, 2), dtype=np.int64)
    order = np.argsort(values, kind="stable")
    again = np.concatenate([[False], values[order[1:]] == values[order[:-1]]])
    starts = np.maximum.accumulate(np.where(again, 0, np.arange(len(order))))
    pairs = np.stack([order[starts[again]], order[again]], axis=1)
    return pairs[pairs[:, 1].argsort()]
