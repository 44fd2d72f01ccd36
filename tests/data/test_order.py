"""The order of a data set: every row once per epoch, the same everywhere, resumable in place, near in storage."""

from __future__ import annotations

import itertools

import pytest

from framework.data.order import DataPosition, ShuffledOrder, check_batch_size, first_rows
from framework.errors import CheckpointError, ConfigError


def test_every_row_once_per_epoch_and_epochs_differ() -> None:
    order = ShuffledOrder(100, seed=3)
    epochs = [order.next(100) for _ in range(3)]
    assert all(sorted(epoch) == list(range(100)) for epoch in epochs)
    assert len(set(epochs)) == 3


def test_the_order_is_this_one() -> None:
    # numpy's RandomState is frozen, so a checkpoint means the same on every machine and with every numpy.
    assert ShuffledOrder(10, seed=7).next(20) == (8, 1, 0, 5, 7, 2, 3, 6, 4, 9, 9, 1, 6, 5, 0, 3, 2, 7, 4, 8)
    assert ShuffledOrder(10, seed=2**40).next(10) != ShuffledOrder(10, seed=0).next(10)


@pytest.mark.parametrize("blocks", [None, [4, 1, 7, 5, 3]])
def test_batches_do_not_change_the_order(blocks: list[int] | None) -> None:
    whole = ShuffledOrder(20, seed=1, blocks=blocks, pool_rows=8).next(70)
    order = ShuffledOrder(20, seed=1, blocks=blocks, pool_rows=8)
    assert tuple(itertools.chain.from_iterable(order.next(7) for _ in range(10))) == whole


@pytest.mark.parametrize("drawn", [0, 1, 19, 20, 33])
def test_a_restored_order_goes_on_in_place(drawn: int) -> None:
    order = ShuffledOrder(20, seed=1, blocks=[4, 1, 7, 5, 3], pool_rows=8)
    order.next(drawn)
    restored = ShuffledOrder(20, seed=1, blocks=[4, 1, 7, 5, 3], pool_rows=8)
    restored.load_state_dict(order.state_dict())
    assert restored.position == DataPosition(epoch=drawn // 20, index=drawn % 20)
    assert restored.next(30) == order.next(30)


def test_a_state_of_other_data_is_refused() -> None:
    state = ShuffledOrder(20, seed=1).state_dict()
    with pytest.raises(CheckpointError, match="for seed=1, this run has seed=2"):
        ShuffledOrder(20, seed=2).load_state_dict(state)
    with pytest.raises(CheckpointError, match="for size=20, this run has size=21"):
        ShuffledOrder(21, seed=1).load_state_dict(state)


def test_rows_of_a_block_are_drawn_near_each_other() -> None:
    blocks = [10] * 100
    rows = ShuffledOrder(1000, seed=0, blocks=blocks, pool_rows=50).next(1000)
    assert sorted(rows) == list(range(1000))
    pools = [rows[start : start + 50] for start in range(0, 1000, 50)]
    assert all(len({row // 10 for row in pool}) == 5 for pool in pools)
    assert sum(a // 10 == b // 10 for a, b in itertools.pairwise(rows)) < 300  # shuffled within the pool


def test_an_empty_data_set_has_no_order() -> None:
    with pytest.raises(ConfigError, match="0 rows has no order"):
        ShuffledOrder(0, seed=0)


def test_blocks_of_the_first_rows() -> None:
    assert first_rows([4, 4, 4], 6) == [4, 2]
    assert first_rows([4, 4, 4], 8) == [4, 4]
    assert first_rows([4, 0, 4], 12) == [4, 0, 4]
    assert first_rows(None, 6) is None
    order = ShuffledOrder(6, seed=0, blocks=first_rows([4, 4, 4], 6))
    assert sorted(order.next(6)) == list(range(6))


def test_a_batch_that_leaves_a_replica_without_rows_is_refused() -> None:
    assert check_batch_size(2, 2) is None
    with pytest.raises(ConfigError, match=r"data\.batch_size=1: 2 data-parallel replicas"):
        check_batch_size(1, 2)
