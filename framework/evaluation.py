"""Evaluation: rollouts of held-out problems as accuracy with its uncertainty and pass@k, as a table and as JSON.

Used inside training (:func:`greedy_accuracy`) and by the recipe ``evaluate``, which compares the base model with an
adapter. How problems are played is :func:`framework.rollout.collect`; nothing here samples by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from framework.engine.base import RolloutEngine
from framework.environments.base import Problems
from framework.errors import ConfigError
from framework.rollout import Coordinator, collect
from framework.types import AdapterRef, RolloutGroup, SamplingParams

Z_95 = 1.959963984540054
"""The 97.5% quantile of the standard normal distribution: two-sided 95%."""
FULL_REWARD = 1.0
"""A rollout that earns at least this solved its problem."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationResult:
    """One model on one environment."""

    environment: str
    model: str
    """What was sampled from, e.g. ``base`` or ``policy@7``."""
    num_problems: int
    num_samples: int
    """Rollouts per problem."""
    accuracy: float
    """Mean over problems of the fraction of rollouts that solved it; equals pass@1."""
    accuracy_low: float
    accuracy_high: float
    """95% interval over problems: Wilson's with one rollout per problem, else of the mean's normal approximation, or
    again Wilson's where all problems have the same fraction."""
    pass_at_k: dict[int, float]
    """k to pass@k, for k = 1, 2, 4, ... up to ``num_samples``."""
    reward_mean: float
    completion_tokens_mean: float
    truncated_fraction: float
    """Rollouts that were cut by a token limit."""


def evaluate(
    engine: RolloutEngine,
    ref: AdapterRef | None,
    problems: Problems,
    indices: Sequence[int],
    *,
    environment: str,
    num_samples: int,
    sampling: SamplingParams,
    seed: int,
    coordinator: Coordinator,
    timeout_s: float = 120.0,
    max_turns: int = 1,
    gather: Callable[[Sequence[RolloutGroup]], Sequence[RolloutGroup]] = lambda groups: groups,
) -> EvaluationResult:
    """Plays every problem ``num_samples`` times; arguments and errors as :func:`framework.rollout.collect`.

    Args:
        indices: this replica's share.
        environment: its name in the table.
        gather: from this replica's groups to those of all replicas; every rank calls it.

    Raises:
        ConfigError: several greedy samples, which would be equal.
    """
    if num_samples > 1 and sampling.temperature == 0.0:
        raise ConfigError(f"{num_samples} samples at temperature 0 are equal; set a temperature, or one sample")
    result = collect(
        engine,
        ref,
        problems,
        indices,
        group_size=num_samples,
        sampling=sampling,
        seed=seed,
        step=0,
        coordinator=coordinator,
        timeout_s=timeout_s,
        max_turns=max_turns,
    )
    return summarise(gather(result.groups), environment=environment, model="base" if ref is None else str(ref))


def greedy_accuracy(
    engine: RolloutEngine,
    ref: AdapterRef | None,
    problems: Problems,
    indices: Sequence[int],
    *,
    max_tokens: int,
    coordinator: Coordinator,
    timeout_s: float = 120.0,
    max_turns: int = 1,
) -> float:
    """The fraction of problems whose greedy rollout solves them, in [0, 1]; 0 without problems."""
    if not indices:
        return 0.0
    result = evaluate(
        engine,
        ref,
        problems,
        indices,
        environment="",
        num_samples=1,
        sampling=SamplingParams(max_tokens=max_tokens, temperature=0.0),
        seed=0,
        coordinator=coordinator,
        timeout_s=timeout_s,
        max_turns=max_turns,
    )
    return result.accuracy


def summarise(groups: Sequence[RolloutGroup], *, environment: str, model: str) -> EvaluationResult:
    """Numbers of groups of one size, at least one group."""
    num_samples = len(groups[0].rollouts)
    solved = [sum(reward >= FULL_REWARD for reward in group.rewards) for group in groups]
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    fractions = [count / num_samples for count in solved]
    if num_samples == 1:
        low, high = wilson_interval(sum(solved), len(groups))
    else:
        low, high = mean_interval(fractions)
    ks = [2**power for power in range(num_samples.bit_length()) if 2**power <= num_samples]
    return EvaluationResult(
        environment=environment,
        model=model,
        num_problems=len(groups),
        num_samples=num_samples,
        accuracy=math.fsum(fractions) / len(groups),
        accuracy_low=low,
        accuracy_high=high,
        pass_at_k={k: math.fsum(pass_at_k(num_samples, count, k) for count in solved) / len(groups) for k in ks},
        reward_mean=math.fsum(rollout.reward for rollout in rollouts) / len(rollouts),
        completion_tokens_mean=sum(sum(rollout.loss_mask) for rollout in rollouts) / len(rollouts),
        truncated_fraction=sum(rollout.stop_reason == "length" for rollout in rollouts) / len(rollouts),
    )


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that one of k samples is right, without bias: 1 - C(n - c, k) / C(n, k).

    Chen et al. 2021 (arXiv 2107.03374), eq. 1.

    Args:
        n: samples drawn.
        c: those that were right, 0 <= c <= n.
        k: 1 <= k <= n.
    """
    assert 0 <= c <= n, f"{c} of {n} samples are right"
    assert 1 <= k <= n, f"pass@{k} of {n} samples"
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def wilson_interval(successes: float, trials: int, z: float = Z_95) -> tuple[float, float]:
    """Score interval of a proportion (Wilson 1927; Brown, Cai and DasGupta 2001, eq. 4)."""
    p = successes / trials
    centre = (p + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials))
    # At 0 and 1 the bound is the proportion itself, which rounding may miss by a bit.
    return (0.0 if successes == 0 else centre - half, 1.0 if successes == trials else centre + half)


def mean_interval(values: Sequence[float], z: float = Z_95) -> tuple[float, float]:
    """Mean plus and minus z standard errors, cut to [0, 1]; (0, 1) for a single value, which says nothing.

    Values that are all equal have no standard error, and 0 of 16 is not surely 0: theirs is Wilson's interval.
    """
    n = len(values)
    if n == 1:
        return 0.0, 1.0
    if min(values) == max(values):
        return wilson_interval(values[0] * n, n, z)
    mean = math.fsum(values) / n
    error = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n)
    return max(0.0, mean - z * error), min(1.0, mean + z * error)


def results_table(results: Sequence[EvaluationResult]) -> str:
    """A Markdown table, one line per result; pass@k columns are those that every result has."""
    ks = sorted(set.intersection(*(set(result.pass_at_k) for result in results)) - {1})
    header = ["environment", "model", "problems", "accuracy", "95% interval", *(f"pass@{k}" for k in ks)]
    header += ["reward", "tokens", "cut"]
    lines = [header, ["---"] * len(header)]
    for r in results:
        passes = [f"{100 * r.pass_at_k[k]:.1f}" for k in ks]
        interval = f"{100 * r.accuracy_low:.1f} to {100 * r.accuracy_high:.1f}"
        measured = [f"{r.reward_mean:.3f}", f"{r.completion_tokens_mean:.1f}", f"{100 * r.truncated_fraction:.1f}%"]
        lines.append(
            [r.environment, r.model, str(r.num_problems), f"{100 * r.accuracy:.1f}", interval, *passes, *measured]
        )
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def to_json(results: Sequence[EvaluationResult]) -> list[dict[str, Any]]:
    """Plain values for ``json.dumps``."""
    return [{**asdict(r), "pass_at_k": {str(k): value for k, value in r.pass_at_k.items()}} for r in results]
