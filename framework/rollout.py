"""collect(): drives environments through the engine and returns groups of rollouts.

Every rank of a tensor-parallel group calls it with the same arguments. Environments, rewards and tokenisation run on
the leader (tensor-parallel rank 0) only; the requests of each turn are broadcast and every rank submits them and steps
its engine alike. What the leader cannot do (a reward that raises) is broadcast too, so that every rank raises the same
error. It knows neither algorithms nor tokenizers.

A turn's completions run together; a reward is computed while the others of its turn are still being sampled, the next
turn starts when the last reward is in. That keeps the engine's batches, and so the samples, independent of how long a
reward takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

from framework.algorithms.base import Metric
from framework.algorithms.reward_shaping import is_informative
from framework.engine.base import RolloutEngine, SampleRequest
from framework.environments.base import Problems
from framework.environments.episodes import Leader, Plan
from framework.environments.workers import Workers
from framework.errors import EnvironmentFailure, FrameworkError, StaleSampleError
from framework.types import AdapterRef, Completion, RolloutGroup, SamplingParams

MAX_CONCURRENT_ENVIRONMENTS = 64
"""Environment calls that run at once on the leader."""

T = TypeVar("T")


class Coordinator(Protocol):
    """The tensor-parallel group as far as collect() needs it; ``Mesh`` is one."""

    @property
    def is_leader(self) -> bool:
        """True on tensor-parallel rank 0."""

    def run_on_leader(self, work: Callable[[], T]) -> T:
        """Runs ``work`` on the leader; its value or its error on every rank. All ranks of the group call it."""

    def check_lockstep(self, what: str, value: object) -> None:
        """Raises LockstepError on every rank when ``value`` differs between them. All ranks of the group call it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectResult:
    """The same on every rank, except that each rollout carries the rank's own AdapterRef."""

    groups: tuple[RolloutGroup, ...]
    """In the order of the indices, each of ``group_size`` rollouts."""
    metrics: Mapping[str, Metric]
    """``reward/*``, with the environment's own as ``reward/env/*``, ``rollout/*``, and two times of the leader.

    ``time/generate_s`` is the time in the engine, ``time/reward_s`` the time in which only environments ran.
    """


def collect(
    engine: RolloutEngine,
    ref: AdapterRef | None,
    problems: Problems,
    indices: Sequence[int],
    *,
    group_size: int,
    sampling: SamplingParams,
    seed: int,
    step: int,
    coordinator: Coordinator,
    timeout_s: float = 120.0,
    max_turns: int = 1,
    attempt: int = 0,
) -> CollectResult:
    """Plays ``group_size`` rollouts of every problem in ``indices``.

    Args:
        ref: the adapter version to sample from; None is the base model.
        problems: read on the leader only.
        sampling: for every turn; its seed is replaced by :func:`framework.environments.episodes.request_seed`.
        timeout_s: limit of one environment call in seconds.
        max_turns: a rollout that is not done after so many completions ends there.
        attempt: distinguishes several calls for the same step.

    Raises:
        EnvironmentFailure: an environment or reward raised, hung, or returned something that is not a finite number,
            or changed tokens that the model had already seen; on every rank, naming the problem.
        ConfigError: a first prompt does not fit the engine's context; on every rank.
        StaleSampleError: the engine sampled from another version than ``ref``.
    """
    with Workers(num_threads=MAX_CONCURRENT_ENVIRONMENTS, timeout_s=timeout_s) as workers:
        plan = Plan(sampling=sampling, seed=seed, step=step, attempt=attempt, max_turns=max_turns, timeout_s=timeout_s)
        leader = Leader(problems, plan, workers, max_tokens_in_context=engine.max_prompt_tokens)
        requests = coordinator.run_on_leader(lambda: leader.start(indices, group_size))
        while requests:
            give = leader.give if coordinator.is_leader else None
            mine = [replace(request, adapter=ref) for request in requests]
            coordinator.check_lockstep("generate", [_identity(request) for request in mine])
            _sample(engine, mine, give)
            requests = coordinator.run_on_leader(leader.next_turn)
        result = coordinator.run_on_leader(lambda: _result(leader, group_size))
    return replace(result, groups=tuple(_with_adapter(group, ref) for group in result.groups))


def collect_filtered(
    collect_round: Callable[[Sequence[int], int], CollectResult],
    draw: Callable[[int], Sequence[int]],
    *,
    num_groups: int,
    max_rounds: int,
    largest: Callable[[int], int] = lambda value: value,
) -> CollectResult:
    """Dynamic sampling with refill: only groups whose rewards differ count (DAPO, Yu et al. 2025, eq. 11).

    All replicas draw alike, as many as the one that lacks most, so that they stay at one place of the data set.

    Args:
        collect_round: ``(indices, attempt) -> CollectResult``, a :func:`collect` with everything else bound.
        draw: the next n problem indices of this replica; it advances every replica's order alike.
        num_groups: how many groups to return, on each replica.
        max_rounds: after so many rounds fewer are returned.
        largest: the maximum of a number over all replicas; every rank calls it the same number of times.

    Raises:
        EnvironmentFailure: after ``max_rounds`` a replica has not one group whose rewards differ; on every rank.
    """
    kept: list[RolloutGroup] = []
    metrics: dict[str, Metric] = {}
    drawn = 0
    rounds = 0
    while rounds < max_rounds:
        missing = max(0, num_groups - len(kept))
        rate = max(len(kept), 1) / drawn if drawn else 1.0
        wanted = largest(min(num_groups, math.ceil(missing / rate)))
        if not wanted:
            break
        indices = draw(wanted)
        result = collect_round(indices, rounds)
        kept.extend(group for group in result.groups if is_informative(group))
        metrics = add_metrics(metrics, result.metrics)
        drawn += len(indices)
        rounds += 1
    if largest(int(not kept)):
        raise EnvironmentFailure(
            f"dynamic sampling: in {rounds} rounds none of {drawn} groups of a replica has rewards that differ; "
            "the task is too easy or too hard for this model, or the group size too small"
        )
    metrics["rollout/filter_kept_fraction"] = Metric(sum=float(len(kept)), count=float(drawn))
    metrics["rollout/filter_rounds"] = Metric(sum=float(rounds), count=1.0)
    return CollectResult(groups=tuple(kept[:num_groups]), metrics=metrics)


def add_metrics(first: Mapping[str, Metric], second: Mapping[str, Metric]) -> dict[str, Metric]:
    """Adds sums and counts key by key; times add up because their count stays 1."""
    total = dict(first)
    for key, metric in second.items():
        before = total.get(key, Metric(sum=0.0, count=0.0))
        count = 1.0 if key.startswith("time/") else before.count + metric.count
        total[key] = Metric(sum=before.sum + metric.sum, count=count)
    return total


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleRow:
    """One row of the samples table."""

    problem_id: str
    prompt: str
    completion: str
    """From the first sampled token on, the environment's later turns included."""
    reward: float
    num_tokens: int
    """Sampled ones."""
    adapter: str
    """``name@version``; empty for the base model."""
    content_hash: str
    """Of the leader's shards of that version."""


def sample_rows(
    groups: Sequence[RolloutGroup], decode: Callable[[Sequence[int]], str], *, limit: int
) -> tuple[SampleRow, ...]:
    """The first rollout of each of the first ``limit`` groups, as text."""
    rows: list[SampleRow] = []
    for group in groups[:limit]:
        rollout = group.rollouts[0]
        start = rollout.loss_mask.index(True)
        row = SampleRow(
            problem_id=group.problem_id,
            prompt=decode(rollout.token_ids[:start]),
            completion=decode(rollout.token_ids[start:]),
            reward=rollout.reward,
            num_tokens=sum(rollout.loss_mask),
            adapter=str(rollout.adapter or ""),
            content_hash=rollout.adapter.content_hash if rollout.adapter else "",
        )
        rows.append(row)
    return tuple(rows)


def _identity(request: SampleRequest) -> tuple[object, ...]:
    """What must be the same on every rank; the version's content hash is of a rank's own shards and is left out."""
    version = (request.adapter.name, request.adapter.version) if request.adapter else None
    return request.request_id, request.prompt.token_ids, request.sampling, version


def _sample(
    engine: RolloutEngine, requests: Sequence[SampleRequest], give: Callable[[str, Completion], None] | None
) -> None:
    """Submits one turn and steps the engine until all have ended; ``give`` sees each completion as it ends."""
    expected = {request.request_id: request.adapter for request in requests}
    submitted: list[str] = []
    try:
        for request in requests:
            engine.submit(request)
            submitted.append(request.request_id)
    except FrameworkError:
        engine.abort(submitted)  # the caller may go on with this engine, e.g. the service
        raise
    pending = set(expected)
    while pending:
        output = engine.step()
        for request_id, completion in output.finished.items():
            pending.remove(request_id)
            if completion.adapter != expected[request_id]:
                raise StaleSampleError(
                    f"request {request_id} asked for {expected[request_id]}, the engine sampled {completion.adapter}"
                )
            if give is not None:
                give(request_id, completion)
        assert output.finished or engine.has_unfinished(), f"the engine lost the requests {sorted(pending)}"


def _result(leader: Leader, group_size: int) -> CollectResult:
    groups = leader.groups(group_size)
    times = {
        "time/generate_s": Metric(sum=leader.generate_s, count=1.0),
        "time/reward_s": Metric(sum=leader.reward_s, count=1.0),
    }
    return CollectResult(groups=groups, metrics={**rollout_metrics(groups), **times})


def _with_adapter(group: RolloutGroup, ref: AdapterRef | None) -> RolloutGroup:
    return replace(group, rollouts=tuple(replace(rollout, adapter=ref) for rollout in group.rollouts))


def rollout_metrics(groups: Sequence[RolloutGroup]) -> dict[str, Metric]:
    """Means over rollouts, except ``reward/group_std`` and ``reward/flat_group_fraction``, which are over groups.

    ``reward/std`` is over all rollouts; a group is flat when its rewards are all equal and so teach nothing.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    n = float(len(rollouts))
    mean = math.fsum(r.reward for r in rollouts) / max(n, 1.0)
    variance = math.fsum((r.reward - mean) ** 2 for r in rollouts) / max(n, 1.0)
    metrics = {
        "reward/mean": Metric(sum=mean * n, count=n),
        "reward/std": Metric(sum=math.sqrt(variance) * n, count=n),
        "reward/group_std": Metric(sum=math.fsum(_std(g.rewards) for g in groups), count=float(len(groups))),
        "reward/flat_group_fraction": Metric(
            sum=float(sum(max(g.rewards) == min(g.rewards) for g in groups)), count=float(len(groups))
        ),
        "rollout/completion_tokens": Metric(sum=float(sum(sum(r.loss_mask) for r in rollouts)), count=n),
        "rollout/tokens": Metric(sum=float(sum(len(r.token_ids) for r in rollouts)), count=n),
        "rollout/turns": Metric(sum=float(sum(r.num_turns for r in rollouts)), count=n),
        "rollout/truncated_fraction": Metric(sum=float(sum(r.stop_reason == "length" for r in rollouts)), count=n),
    }
    for name in sorted({name for rollout in rollouts for name in rollout.metrics}):
        values = [rollout.metrics[name] for rollout in rollouts if name in rollout.metrics]
        metrics[f"reward/env/{name}"] = Metric(sum=math.fsum(values), count=float(len(values)))
    return metrics


def _std(values: Sequence[float]) -> float:
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values))
