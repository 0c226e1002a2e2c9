"""Random numbers of a scene.

Only uniform doubles of a counter-based generator (Philox) are drawn, keyed by (seed, index): any scene can be made
alone, keys do not collide as hashed seeds would, and no library's distributions can move a scene.
"""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")


class Draws:
    """Random draws of one (seed, index, stream): 0 for the scene, 1 and 2 for the words of its caption.

    Stream 2 reads the same numbers as stream 0 of the next index. What a caption's wording shares with the next scene
    is of no use to anyone, and version 1 of the generator is frozen.
    """

    def __init__(self, seed: int, index: int, stream: int = 0) -> None:
        key = np.array([seed, index * 2 + stream], dtype=np.uint64)
        self._values = iter(np.random.Generator(np.random.Philox(key=key)).random(1024).tolist())

    def uniform(self, low: float, high: float) -> float:
        """A number in [low, high)."""
        return low + (high - low) * next(self._values)

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return next(self._values) < probability

    def pick(self, items: Sequence[T], weights: Sequence[float] | None = None) -> T:
        """One of the items, by weight."""
        place = next(self._values) * (sum(weights) if weights else len(items))
        for item, weight in zip(items, weights or (1.0,) * len(items), strict=True):
            place -= weight
            if place < 0:
                return item
        return items[-1]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """The items in random order."""
        left = list(items)
        return [left.pop(int(next(self._values) * len(left))) for _ in range(len(left))]
