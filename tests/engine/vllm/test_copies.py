"""Plans of copies: every factor arrives, neighbours in both memories travel as one, nothing of a slot's past stays."""

from __future__ import annotations

import torch
from torch import Tensor

from framework.engine.vllm.copies import plan_copies
from framework.engine.vllm.internals import SlotRows
from framework.trainer.base import LoraShard

PATHS = ("first", "second", "third")
RANK, WIDTH, HEIGHT = 2, 3, 5


def pieces(memory: Tensor, rank: int) -> list[Tensor]:
    """Three ``[rank, WIDTH]`` and then three ``[HEIGHT, rank]`` views, end to end."""
    shapes = [(rank, WIDTH)] * 3 + [(HEIGHT, rank)] * 3
    sizes = [rows * columns for rows, columns in shapes]
    return [part.view(shape) for part, shape in zip(memory[: sum(sizes)].split(sizes), shapes, strict=True)]


def shards_of(memory: Tensor) -> dict[str, LoraShard]:
    views = pieces(memory, RANK)
    return {path: LoraShard(a=views[i], b=views[3 + i]) for i, path in enumerate(PATHS)}


def rows_of(memory: Tensor, width: int = RANK) -> dict[str, SlotRows]:
    views, rows = pieces(memory, width), {}
    for i, path in enumerate(PATHS):
        a, b = views[i], views[3 + i]
        rows[path] = SlotRows(a=a[:RANK], b=b[:, :RANK], beyond=(a[RANK:], b[:, RANK:]))
    return rows


SIZE = 3 * RANK * (WIDTH + HEIGHT)


def test_memory_in_the_same_order_travels_as_one_copy() -> None:
    source, slot = torch.arange(SIZE).bfloat16(), torch.full((SIZE,), -1.0).bfloat16()
    plan = plan_copies(shards_of(source), rows_of(slot))
    assert [t.numel() for t in plan.targets] == [SIZE]
    assert plan.stale == []
    plan.run()
    assert torch.equal(slot, source)


def test_another_order_and_separate_allocations_arrive_as_well() -> None:
    source, slot = torch.arange(SIZE).bfloat16(), torch.full((SIZE,), -1.0).bfloat16()
    shards = shards_of(source)
    shards["second"] = LoraShard(a=shards["second"].a.clone(), b=shards["second"].b)
    swapped = rows_of(slot)
    rows = {"first": swapped["third"], "second": swapped["second"], "third": swapped["first"]}
    plan = plan_copies(shards, rows)
    assert len(plan.targets) > 1
    plan.run()
    for path in PATHS:
        assert torch.equal(rows[path].a, shards[path].a), path
        assert torch.equal(rows[path].b, shards[path].b), path


def test_a_wider_slot_and_a_module_without_adapter_are_zero_beside_it() -> None:
    wide = 2 * RANK
    source, slot = torch.arange(1, SIZE + 1).bfloat16(), torch.full((2 * SIZE,), -1.0).bfloat16()
    shards, rows = shards_of(source), rows_of(slot, wide)
    del shards["third"]
    plan_copies(shards, rows).run()
    for path, shard in shards.items():
        assert torch.equal(rows[path].a, shard.a), path
        assert torch.equal(rows[path].b, shard.b), path
    outside = [rows["third"].a, rows["third"].b, *(view for row in rows.values() for view in row.beyond)]
    assert sum(view.numel() for view in outside) == 2 * SIZE - 2 * SIZE // 3
    assert all(view.eq(0).all() for view in outside)


def test_a_later_value_is_copied_by_the_same_plan() -> None:
    source, slot = torch.zeros(SIZE).bfloat16(), torch.zeros(SIZE).bfloat16()
    plan = plan_copies(shards_of(source), rows_of(slot))
    source.fill_(3.0)
    plan.run()
    assert torch.equal(slot, source)
