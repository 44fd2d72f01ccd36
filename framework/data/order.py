"""The order in which problems are drawn: shuffled anew each epoch from a seed, and resumable in place."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence


class ShuffledOrder:
    """Indices of a collection, epoch after epoch. Its whole state is how many were drawn."""

    def __init__(self, size: int, *, seed: int, drawn: int = 0) -> None:
        self._size = size
        self._seed = seed
        self.drawn = drawn
        self._epoch = -1
        self._order: list[int] = []

    def next(self, count: int) -> Sequence[int]:
        """The next ``count`` indices; the same for the same seed, wherever it is asked."""
        indices = []
        for position in range(self.drawn, self.drawn + count):
            epoch, offset = divmod(position, self._size)
            if epoch != self._epoch:
                digest = hashlib.sha256(f"{self._seed}:{epoch}".encode()).digest()
                self._order = list(range(self._size))
                random.Random(int.from_bytes(digest[:8], "big")).shuffle(self._order)
                self._epoch = epoch
            indices.append(self._order[offset])
        self.drawn += count
        return indices
