"""Greedy accuracy on held-out problems."""

from __future__ import annotations

from collections.abc import Sequence

from framework.engine.base import RolloutEngine
from framework.environments.base import Problems
from framework.rollout import Coordinator, collect
from framework.types import AdapterRef, SamplingParams


def greedy_accuracy(
    engine: RolloutEngine,
    ref: AdapterRef | None,
    problems: Problems,
    indices: Sequence[int],
    *,
    max_tokens: int,
    coordinator: Coordinator,
    max_turns: int = 1,
) -> float:
    """The fraction of problems whose greedy rollout earns the full reward of 1.

    Args:
        ref: adapter version, or None for the base model.
        indices: which problems.
        max_tokens: of one completion.
    """
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0)
    result = collect(
        engine,
        ref,
        problems,
        indices,
        group_size=1,
        sampling=sampling,
        seed=0,
        step=0,
        coordinator=coordinator,
        max_turns=max_turns,
    )
    return sum(group.rewards[0] >= 1.0 for group in result.groups) / len(result.groups)
