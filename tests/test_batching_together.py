"""pack(keep_together=k): runs of consecutive datums share a microbatch, side by side and in order."""

from __future__ import annotations

import numpy as np
import pytest

from framework.batching import Batch, Example, pack
from framework.errors import ConfigError


def example(length: int) -> Example:
    """A sequence with a recognisable length, every position scored."""
    return Example(
        input_ids=np.full(length, length, dtype=np.int64),
        scored=np.arange(length),
        target_ids=np.zeros(length, dtype=np.int64),
        weights=np.ones(length, dtype=np.float32),
    )


def layout(batch: Batch) -> list[tuple[int, ...]]:
    return [microbatch.datum_ids for microbatch in batch.microbatches]


def test_pairs_stay_together_and_in_order() -> None:
    """Pairs of 3+4, 2+1, 5+2, 1+1 tokens; first fit, longest pair first: 7 | 7 then 3 fits beside, then 2."""
    examples = [example(n) for n in (3, 4, 2, 1, 5, 2, 1, 1)]
    batch = pack(examples, max_tokens=10, keep_together=2)
    assert layout(batch) == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert batch.microbatches[0].input_ids.tolist() == [3] * 3 + [4] * 4 + [2] * 2 + [1]
    assert batch.microbatches[0].sequence_ids.tolist() == [0] * 3 + [1] * 4 + [2] * 2 + [3]
    # One by one the same datums part: 5, 4 and 1 in one microbatch, the rest elsewhere.
    assert layout(pack(examples, max_tokens=10)) == [(1, 3, 4), (0, 2, 5, 6, 7)]


def test_an_incomplete_run_is_an_error() -> None:
    with pytest.raises(ConfigError, match="3 datums cannot be kept together in runs of 2"):
        pack([example(1)] * 3, max_tokens=10, keep_together=2)


def test_a_run_longer_than_the_budget_is_an_error_though_each_datum_fits() -> None:
    with pytest.raises(ConfigError, match="datums 2 to 3, kept together, have 12 tokens"):
        pack([example(n) for n in (1, 1, 6, 6)], max_tokens=10, keep_together=2)
    with pytest.raises(ConfigError, match="datum 1 has 11 tokens"):
        pack([example(1), example(11)], max_tokens=10)
