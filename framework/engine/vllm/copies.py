"""A push as few copies: which pieces of a trainer's memory go where in a slot, worked out once per adapter and slot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from framework.engine.vllm.internals import SlotRows
from framework.trainer.base import LoraShard


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyPlan:
    """Copies one adapter's factors into one slot; holds for these shards and no others."""

    shards: Mapping[str, LoraShard]
    sources: list[Tensor]
    targets: list[Tensor]
    stale: list[Tensor]
    """What of the slot the adapter does not cover; zeroed, for it may hold another one's factors."""

    def run(self) -> None:
        """Copies."""
        if self.stale:
            torch._foreach_zero_(self.stale)
        torch._foreach_copy_(self.targets, self.sources)


def plan_copies(shards: Mapping[str, LoraShard], rows: Mapping[str, SlotRows]) -> CopyPlan:
    """The plan for an adapter in the slot with these ``rows`` of its rank."""
    sources = [factor for shard in shards.values() for factor in (shard.a, shard.b)]
    targets = [view for path in shards for view in (rows[path].a, rows[path].b)]
    whole = [view for path in rows if path not in shards for view in (rows[path].a, rows[path].b)]
    beyond = [view for row in rows.values() for view in row.beyond]
    pairs = _joined(sources, targets)
    return CopyPlan(
        shards=shards,
        sources=[source for source, _ in pairs],
        targets=[target for _, target in pairs],
        stale=[view for view in whole + beyond if view.numel()],
    )


def _joined(sources: Sequence[Tensor], targets: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Pairs in which neighbours that follow each other in both memories have become one."""
    pairs = sorted(zip(sources, targets, strict=True), key=lambda pair: pair[0].data_ptr())
    joined: list[list[tuple[Tensor, Tensor]]] = []
    for pair in pairs:
        if joined and all(_follows(before, after) for before, after in zip(joined[-1][-1], pair, strict=True)):
            joined[-1].append(pair)
        else:
            joined.append([pair])
    return [run[0] if len(run) == 1 else (_span([s for s, _ in run]), _span([t for _, t in run])) for run in joined]


def _follows(before: Tensor, after: Tensor) -> bool:
    """Whether ``after`` begins where ``before`` ends, both without gaps, in one allocation."""
    return (
        before.is_contiguous()
        and after.is_contiguous()
        and before.dtype == after.dtype
        and before.untyped_storage().data_ptr() == after.untyped_storage().data_ptr()
        and before.data_ptr() + before.nbytes == after.data_ptr()
    )


def _span(run: Sequence[Tensor]) -> Tensor:
    """One flat view over all of them."""
    return run[0].as_strided((sum(part.numel() for part in run),), (1,))
