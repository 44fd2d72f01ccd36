"""What is made of finished groups: dynamic sampling with refill, metrics, the samples table."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from framework.algorithms.base import Metric
from framework.errors import EnvironmentFailure
from framework.rollout import CollectResult, collect_filtered, rollout_metrics, sample_rows
from framework.types import AdapterRef, Rollout, RolloutGroup


def group(*rewards: float, name: str = "p") -> RolloutGroup:
    rollouts = tuple(
        Rollout(
            token_ids=(1, 2, 3),
            loss_mask=(False, True, True),
            sampling_logprobs=(0.0, -1.0, -1.0),
            reward=reward,
            adapter=None,
            stop_reason="length" if reward < 0 else "stop",
            metrics={"correct": 1.0} if reward == 3.0 else {},
        )
        for reward in rewards
    )
    return RolloutGroup(rollouts=rollouts, problem_id=name)


def test_metrics_are_sums_and_counts_that_give_the_means() -> None:
    metrics = rollout_metrics([group(1.0, 3.0), group(-2.0, -2.0)])
    means = {name: float(metric.sum) / float(metric.count) for name, metric in metrics.items()}
    assert means == pytest.approx(
        {
            "reward/mean": 0.0,
            "reward/std": 4.5**0.5,  # of 1, 3, -2, -2
            "reward/group_std": 0.5,  # of 1 and 0
            "reward/flat_group_fraction": 0.5,
            "reward/env/correct": 1.0,
            "rollout/completion_tokens": 2.0,
            "rollout/tokens": 3.0,
            "rollout/turns": 1.0,
            "rollout/truncated_fraction": 0.5,
        }
    )
    assert metrics["reward/env/correct"] == Metric(sum=1.0, count=1.0)


def filtered(
    rewards: Mapping[int, tuple[float, ...]], *, num_groups: int, max_rounds: int
) -> tuple[CollectResult, list[tuple[tuple[int, ...], int]]]:
    """collect_filtered over groups with known rewards; also every (indices, attempt) it asked for."""
    asked: list[tuple[tuple[int, ...], int]] = []
    stream = iter(rewards)

    def collect_round(indices: Sequence[int], attempt: int) -> CollectResult:
        asked.append((tuple(indices), attempt))
        groups = tuple(group(*rewards[index], name=str(index)) for index in indices)
        return CollectResult(groups=groups, metrics={"time/generate_s": Metric(sum=2.0, count=1.0)})

    result = collect_filtered(
        collect_round, lambda n: [next(stream) for _ in range(n)], num_groups=num_groups, max_rounds=max_rounds
    )
    return result, asked


def test_dynamic_sampling_refills_with_groups_whose_rewards_differ() -> None:
    flat, good = (1.0, 1.0), (0.0, 1.0)
    rewards = dict(enumerate([good, flat, flat, good, flat, good, good, good]))
    result, asked = filtered(rewards, num_groups=4, max_rounds=3)
    # Round 0 keeps 0 and 3 of four; two are missing at a rate of one half, so four more are drawn.
    assert asked == [((0, 1, 2, 3), 0), ((4, 5, 6, 7), 1)]
    assert [g.problem_id for g in result.groups] == ["0", "3", "5", "6"]
    assert result.metrics["rollout/filter_kept_fraction"] == Metric(sum=5.0, count=8.0)
    assert result.metrics["rollout/filter_rounds"] == Metric(sum=2.0, count=1.0)
    assert result.metrics["time/generate_s"] == Metric(sum=4.0, count=1.0)


def test_dynamic_sampling_is_bounded() -> None:
    flat, good = (1.0, 1.0), (0.0, 1.0)
    result, asked = filtered({0: good, **dict.fromkeys(range(1, 99), flat)}, num_groups=2, max_rounds=3)
    assert [len(indices) for indices, _ in asked] == [2, 2, 2]
    assert [g.problem_id for g in result.groups] == ["0"]
    with pytest.raises(EnvironmentFailure, match="in 3 rounds none of 6 groups of a replica has rewards that differ"):
        filtered(dict.fromkeys(range(99), flat), num_groups=2, max_rounds=3)


def test_replicas_draw_alike_whatever_they_keep() -> None:
    """Replica 0 keeps everything at once, replica 1 every second group: both draw as replica 1 must."""
    flat, good = (1.0, 1.0), (0.0, 1.0)
    meeting, said = threading.Barrier(2, timeout=10.0), [0, 0]
    drawn: list[list[int]] = [[], []]

    def replica(rank: int) -> CollectResult:
        def largest(value: int) -> int:
            said[rank] = value
            meeting.wait()
            result = max(said)
            meeting.wait()
            return result

        def collect_round(indices: Sequence[int], attempt: int) -> CollectResult:
            groups = tuple(group(*(flat if rank and index % 2 else good), name=str(index)) for index in indices)
            return CollectResult(groups=groups, metrics={})

        def draw(count: int) -> Sequence[int]:
            start = sum(drawn[rank])
            drawn[rank].append(count)
            return range(start, start + count)

        return collect_filtered(collect_round, draw, num_groups=4, max_rounds=5, largest=largest)

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(replica, range(2))
    assert drawn == [[4, 4], [4, 4]]
    assert [g.problem_id for g in first.groups] == ["0", "1", "2", "3"]
    assert [g.problem_id for g in second.groups] == ["0", "2", "4", "6"]


def test_sample_rows_are_text() -> None:
    (row,) = sample_rows([group(1.0, 0.0)], lambda tokens: "-".join(map(str, tokens)), limit=5)
    assert (row.problem_id, row.prompt, row.completion, row.reward, row.num_tokens) == ("p", "1", "2-3", 1.0, 2)
    assert (row.adapter, row.content_hash) == ("", "")


def test_sample_rows_name_the_version_and_its_hash() -> None:
    ref = AdapterRef(name="policy", version=3, content_hash="9f2c")
    whole = group(1.0)
    sampled = replace(whole, rollouts=tuple(replace(rollout, adapter=ref) for rollout in whole.rollouts))
    (row,) = sample_rows([sampled], lambda tokens: "", limit=1)
    assert (row.adapter, row.content_hash) == ("policy@3", "9f2c")
