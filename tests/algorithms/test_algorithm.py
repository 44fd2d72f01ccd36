"""A whole algorithm on rollouts: datums, filters, penalties and advantages, by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from framework.algorithms.algorithm import Algorithm
from framework.algorithms.catalog import AlgorithmConfig, algorithm_config, build_algorithm
from framework.algorithms.datums import with_field
from framework.metrics import check_metrics
from framework.types import Rollout, RolloutGroup, StopReason


def rollout(reward: float, num_sampled: int, stop_reason: StopReason = "stop") -> Rollout:
    """A prompt of two tokens and ``num_sampled`` sampled ones with sampling logprob -1 each."""
    return Rollout(
        token_ids=tuple(range(2 + num_sampled)),
        loss_mask=(False, False) + (True,) * num_sampled,
        sampling_logprobs=(0.0, 0.0) + (-1.0,) * num_sampled,
        reward=reward,
        adapter=None,
        stop_reason=stop_reason,
    )


def group(*rollouts: Rollout) -> RolloutGroup:
    return RolloutGroup(rollouts=rollouts, problem_id="toy/0")


def build(name: str, max_tokens: int = 8) -> Algorithm:
    return build_algorithm(algorithm_config(name), max_tokens=max_tokens)


def test_grpo_gives_every_token_its_rollouts_advantage() -> None:
    """Group 0: 1, 0 -> +-1/2 over the deviation sqrt(1/2) = +-0.70711; group 1 is degenerate."""
    groups = [group(rollout(1.0, 2), rollout(0.0, 3)), group(rollout(1.0, 1), rollout(1.0, 1))]
    algorithm = build("grpo")
    advantages = algorithm.advantages(groups, algorithm.datums(groups))
    a = 0.5 / (math.sqrt(0.5) + 1e-6)
    expected = [[a] * 2, [-a] * 3, [0.0], [0.0]]
    assert [value.tolist() for value in advantages.values] == [pytest.approx(row) for row in expected]
    assert all(value.dtype == np.float32 for value in advantages.values)
    metrics = {key: (metric.sum, metric.count) for key, metric in advantages.metrics.items()}
    check_metrics({key: float(total) for key, (total, _) in metrics.items()})
    assert metrics["reward/mean"] == (3.0, 4.0)
    assert metrics["rollout/uninformative_group_fraction"] == (1.0, 2.0)
    assert metrics["rollout/truncated_fraction"] == (0.0, 4.0)


def test_dapo_filters_penalises_and_asks_for_other_groups() -> None:
    """Limit 10, ramp 2: a rollout of 9 tokens loses 0.5, one of 10 loses 1; the truncated one trains no token."""
    groups = [group(rollout(1.0, 4), rollout(1.0, 9), rollout(0.0, 10, "length"))]
    algorithm = build("dapo", max_tokens=10)
    datums = algorithm.datums(groups)
    assert [sum(datum.loss_mask) for datum in datums] == [4, 9, 0]
    advantages = algorithm.advantages(groups, datums)
    # rewards 1, 0.5, -1: mean 1/6, squares (25 + 4 + 49) / 36 = 78 / 36, deviation sqrt(39 / 36) = 1.040833
    std = math.sqrt(39 / 36) + 1e-6
    assert [len(value) for value in advantages.values] == [4, 9, 0]
    assert advantages.values[0].tolist() == pytest.approx([5 / 6 / std] * 4)
    assert advantages.values[1].tolist() == pytest.approx([1 / 3 / std] * 9)
    assert advantages.metrics["reward/overlong_penalty"].sum == pytest.approx(-1.5)
    assert advantages.metrics["rollout/truncated_fraction"].sum == 1.0


def test_reinforce_pp_puts_the_kl_in_the_reward_and_normalises_over_tokens() -> None:
    """k1 = sampling - ref = -1 + 2 = 1 per token; with coefficient 0.5: A = 1 - (1, 0.5), 0 - (0.5)."""
    config = AlgorithmConfig(
        name="x", advantage="uncentered", batch_normalize=True, kl_coef=0.5, kl_in="reward", aggregation="token_mean"
    )
    algorithm = build_algorithm(config, max_tokens=8)
    groups = [group(rollout(1.0, 2)), group(rollout(0.0, 1))]
    datums = with_field(algorithm.datums(groups), "ref_logprobs", [[-2.0, -2.0], [-2.0]])
    advantages = algorithm.advantages(groups, datums)
    # 0, 0.5, -0.5: mean 0, population deviation sqrt(0.5 / 3)
    std = math.sqrt(0.5 / 3)
    assert np.concatenate(advantages.values).tolist() == pytest.approx([0.0, 0.5 / std, -0.5 / std])
    assert algorithm.needs_ref_logprobs
    # Where the trainer recorded its own logprobs, they are the policy's side of the KL: k1 = -1.5 + 2 = 0.5.
    datums = with_field(datums, "proximal_logprobs", [[-1.5, -1.5], [-1.5]])
    halved = algorithm.advantages(groups, datums)
    # 1 - 0.5, 1 - 0.25, 0 - 0.25: 0.5, 0.75, -0.25; mean 1/3, deviations 1/6, 5/12, -7/12; squares sum 13 / 24
    std = math.sqrt(13 / 24 / 3)
    assert np.concatenate(halved.values).tolist() == pytest.approx([1 / 6 / std, 5 / 12 / std, -7 / 12 / std])


def test_a_batch_of_only_truncated_rollouts_has_no_advantages() -> None:
    algorithm = build("dapo", max_tokens=10)
    groups = [group(rollout(0.0, 10, "length"), rollout(1.0, 10, "length"))]
    advantages = algorithm.advantages(groups, algorithm.datums(groups))
    assert [len(value) for value in advantages.values] == [0, 0]
