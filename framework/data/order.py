"""The order in which a data set is gone through: shuffled per epoch, and resumable in place from one number.

The order is a pure function of (seed, epoch), so how many rows were drawn is all that a checkpoint holds, and every
rank has the same order without talking. Rows that are stored together (the row groups of a Parquet file) stay near
each other, so that a data set larger than memory is read with a bounded cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
import numpy.typing as npt

from framework.errors import CheckpointError, ConfigError

POOL_ROWS = 65_536
"""Blocks are read in random order; their rows are shuffled within pools of at least so many rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataPosition:
    """A place between two rows of an endless walk through a data set."""

    epoch: int
    index: int
    """Rows of this epoch that were drawn."""


class ShuffledOrder:
    """Goes through ``size`` rows for ever, in another order each epoch. Its whole state is how many were drawn.

    Example:
        order = ShuffledOrder(3, seed=0)
        order.next(2)  # (1, 0)
        order.next(2)  # (2, 2): the last of epoch 0, the first of epoch 1
        order.position  # DataPosition(epoch=1, index=1)

    Args:
        size: rows, at least 1.
        seed: of the shuffle.
        drawn: rows drawn so far, over all epochs; to continue from there.
        blocks: lengths of the runs of rows that are stored together; None shuffles all rows freely.
        pool_rows: see :data:`POOL_ROWS`.
    """

    def __init__(
        self,
        size: int,
        *,
        seed: int,
        drawn: int = 0,
        blocks: Sequence[int] | None = None,
        pool_rows: int = POOL_ROWS,
    ) -> None:
        if size < 1:
            raise ConfigError(f"a data set of {size} rows has no order; it needs at least one")
        lengths = [size] if blocks is None else [length for length in blocks if length]
        assert sum(lengths) == size, f"blocks hold {sum(lengths)} rows, the data set {size}"
        self.size = size
        self.seed = seed
        self.drawn = drawn
        self._lengths = np.asarray(lengths, dtype=np.int64)
        self._starts = np.cumsum(self._lengths) - self._lengths
        self._pool_rows = pool_rows
        self._epoch = -1
        self._pools: list[npt.NDArray[np.int64]] = []
        self._ends: npt.NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self._pool = -1
        self._rows: npt.NDArray[np.int64] = np.zeros(0, dtype=np.int64)

    @property
    def position(self) -> DataPosition:
        """Where the next row is."""
        epoch, index = divmod(self.drawn, self.size)
        return DataPosition(epoch=epoch, index=index)

    def next(self, count: int) -> tuple[int, ...]:
        """The next ``count`` row numbers; goes on into the next epoch."""
        rows = tuple(self._row(*divmod(place, self.size)) for place in range(self.drawn, self.drawn + count))
        self.drawn += count
        return rows

    def state_dict(self) -> dict[str, int]:
        """How many rows were drawn, and what must be the same for it to mean the same."""
        return {"drawn": self.drawn, "seed": self.seed, "size": self.size}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Goes on where :meth:`state_dict` was taken.

        Raises:
            CheckpointError: the state is of another seed or of a data set of another size.
        """
        for key, now in (("seed", self.seed), ("size", self.size)):
            if state[key] != now:
                raise CheckpointError(
                    f"the checkpoint's data order is for {key}={state[key]}, this run has {key}={now}; "
                    "use the same data set and seed, or start a new run"
                )
        self.drawn = state["drawn"]

    def _row(self, epoch: int, index: int) -> int:
        if epoch != self._epoch:
            self._epoch, self._pool = epoch, -1
            self._pools, self._ends = self._make_pools(epoch)
        pool = int(np.searchsorted(self._ends, index, side="right"))
        if pool != self._pool:
            self._pool = pool
            rows = np.concatenate([np.arange(self._lengths[b]) + self._starts[b] for b in self._pools[pool]])
            self._rows = _generator(self.seed, epoch, 1 + pool).permutation(rows)
        start = int(self._ends[pool - 1]) if pool else 0
        return int(self._rows[index - start])

    def _make_pools(self, epoch: int) -> tuple[list[npt.NDArray[np.int64]], npt.NDArray[np.int64]]:
        """Shuffled blocks in runs of at least ``pool_rows`` rows, and where in the epoch each run ends."""
        blocks = _generator(self.seed, epoch, 0).permutation(len(self._lengths))
        ends = np.cumsum(self._lengths[blocks])
        cuts: list[int] = []
        while not cuts or cuts[-1] < len(blocks):
            done = int(ends[cuts[-1] - 1]) if cuts else 0
            cut = int(np.searchsorted(ends, done + self._pool_rows)) + 1
            cuts.append(min(cut, len(blocks)))
        starts = [0, *cuts[:-1]]
        pools = [blocks[start:cut] for start, cut in zip(starts, cuts, strict=True)]
        return pools, ends[np.asarray(cuts) - 1]


def first_rows(blocks: Sequence[int] | None, count: int) -> Sequence[int] | None:
    """Lengths of the blocks of a data set's first ``count`` rows, the last one cut where they end.

    Example: ``first_rows([4, 4, 4], 6) == [4, 2]``; None stays None.
    """
    if blocks is None:
        return None
    ends = list(accumulate(blocks, initial=0))
    return [min(end, count) - start for start, end in pairwise(ends) if start < count]


def _generator(seed: int, epoch: int, stream: int) -> np.random.RandomState:
    """numpy keeps RandomState's streams as they are for ever (NEP 19), those of Generator it may change."""
    return np.random.RandomState(
        np.asarray([seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF, epoch, stream], dtype=np.uint32)
    )


def check_batch_size(batch_size: int, num_replicas: int) -> None:
    """Refuses a batch of which a replica would get nothing.

    Raises:
        ConfigError: naming the key and both numbers.
    """
    if batch_size < num_replicas:
        raise ConfigError(f"data.batch_size={batch_size}: {num_replicas} data-parallel replicas share a batch")
