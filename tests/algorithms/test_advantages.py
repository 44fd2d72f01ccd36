"""Advantage estimators: by hand from the papers, then against TRL, verl and OpenRLHF."""

from __future__ import annotations

import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from framework.algorithms.advantages import (
    RolloutEstimator,
    batch_normalized,
    group_centered,
    group_normalized,
    kl_to_go,
    leave_one_out,
    per_token,
    uncentered,
)
from framework.errors import ConfigError
from tests.algorithms.loss_cases import peer, recorded

GROUP_IDS = torch.tensor([0, 0, 0, 1, 1, 1])
LENGTHS = torch.tensor([6, 4, 3, 5, 1, 2])


def test_group_normalized_by_hand() -> None:
    """DeepSeekMath 4.1.2: (r - mean) / std; the rewards 1, 0, 0, 1 have mean 1/2 and sample std 1 / sqrt 3."""
    # centred: +-1/2; squares sum to 1; std = sqrt(1 / 3) = 0.57735; 0.5 / 0.57735 = sqrt(3) / 2 = 0.866025
    advantages = group_normalized(torch.tensor([1.0, 0.0, 0.0, 1.0]), torch.zeros(4, dtype=torch.int64), eps=0.0)
    root = math.sqrt(3) / 2
    assert advantages.tolist() == pytest.approx([root, -root, -root, root])
    with_eps = group_normalized(torch.tensor([1.0, 0.0, 0.0, 1.0]), torch.zeros(4, dtype=torch.int64), eps=0.1)
    assert with_eps[0].item() == pytest.approx(0.5 / (1 / math.sqrt(3) + 0.1))


def test_groups_may_be_interleaved_ragged_and_of_any_id() -> None:
    """Group 7: rewards 1, 3, 5 with mean 3; group -2: rewards 10, 20 with mean 15."""
    rewards = torch.tensor([1.0, 10.0, 3.0, 20.0, 5.0])
    group_ids = torch.tensor([7, -2, 7, -2, 7])
    assert group_centered(rewards, group_ids).tolist() == [-2.0, -5.0, 0.0, 5.0, 2.0]
    # leave one out: 1 - (3 + 5) / 2 = -3, 10 - 20 = -10, 3 - (1 + 5) / 2 = 0, 20 - 10 = 10, 5 - (1 + 3) / 2 = 3
    assert leave_one_out(rewards, group_ids).tolist() == [-3.0, -10.0, 0.0, 10.0, 3.0]
    assert uncentered(rewards, group_ids).tolist() == [1.0, 10.0, 3.0, 20.0, 5.0]


@pytest.mark.parametrize("estimator", [group_normalized, group_centered, leave_one_out])
def test_degenerate_groups_give_exactly_zero(estimator: RolloutEstimator) -> None:
    """0.1 seven times: float32 means are off by 1e-9, which a deviation of as little would blow up."""
    rewards = torch.tensor([0.1] * 7 + [1.0, 0.0])
    advantages = estimator(rewards, torch.tensor([0] * 7 + [1, 1]))
    assert advantages[:7].tolist() == [0.0] * 7
    assert advantages[7].item() > 0.4


def test_a_group_of_one() -> None:
    one = torch.tensor([0])
    assert group_normalized(torch.tensor([5.0]), one).tolist() == [0.0]
    assert group_centered(torch.tensor([5.0]), one).tolist() == [0.0]
    with pytest.raises(ConfigError, match="at least 2 rollouts"):
        leave_one_out(torch.tensor([5.0]), one)


def test_kl_to_go_by_hand() -> None:
    """Rollout 0 has k1 = 0.5, -0.25, 1: to go 1.25, 0.75, 1. Rollout 1 is empty. Rollout 2 has 2, 3: 5, 3."""
    logprobs = torch.tensor([-1.0, -1.25, 0.0, -1.0, -1.0])
    ref_logprobs = torch.tensor([-1.5, -1.0, -1.0, -3.0, -4.0])
    to_go = kl_to_go(logprobs, ref_logprobs, torch.tensor([3, 0, 2]))
    assert to_go.tolist() == pytest.approx([1.25, 0.75, 1.0, 5.0, 3.0])


def test_batch_normalized_by_hand() -> None:
    """Token values 1, 1, 1, -3: mean 0, population variance 12 / 4 = 3."""
    values = per_token(torch.tensor([1.0, -3.0]), torch.tensor([3, 1]))
    root = math.sqrt(3)
    assert batch_normalized(values).tolist() == pytest.approx([1 / root, 1 / root, 1 / root, -3 / root])
    assert batch_normalized(torch.full((5,), 0.3)).abs().max().item() < 1e-11
    # Below a deviation of 1e-4 noise is not blown up: 1e-5 / 1e-4 = 0.1; above, 1e-3 is of the deviation's size.
    assert batch_normalized(torch.tensor([1e-5, -1e-5])).tolist() == pytest.approx([0.1, -0.1])
    assert batch_normalized(torch.tensor([1e-3, -1e-3])).tolist() == pytest.approx([1.0, -1.0])


class SumGroup:
    """A data-parallel group of threads: ``add`` returns every replica's number added up, once all have called it."""

    def __init__(self, num_replicas: int) -> None:
        self.values = [0.0] * num_replicas
        self.barrier = threading.Barrier(num_replicas, timeout=10)

    def add(self, replica: int, value: float) -> float:
        self.values[replica] = value
        self.barrier.wait()
        total = sum(self.values)
        self.barrier.wait()
        return total


def test_batch_normalized_is_that_of_the_whole_batch_on_every_replica() -> None:
    whole = torch.tensor([1.0, 4.0, -2.0, 0.5, 7.0])
    shares = (whole[:2], whole[2:4], whole[4:], whole[:0])
    group = SumGroup(len(shares))

    def on_replica(replica: int) -> Tensor:
        return batch_normalized(shares[replica], global_sum=lambda value: group.add(replica, value))

    with ThreadPoolExecutor(len(shares)) as pool:
        results = list(pool.map(on_replica, range(len(shares))))
    torch.testing.assert_close(torch.cat(results), batch_normalized(whole))


@pytest.mark.parametrize(
    ("case", "estimator"),
    [("advantages/dr_grpo", group_centered), ("advantages/rloo", leave_one_out)],
)
@pytest.mark.parametrize("package", ["trl", "verl", "openrlhf"])
def test_estimators_against_peers(package: str, case: str, estimator: RolloutEstimator) -> None:
    expected = _per_rollout(peer(package)[case]["value"])
    torch.testing.assert_close(estimator(recorded()["group_rewards"], GROUP_IDS), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("package", "eps"), [("trl", 1e-4), ("verl", 1e-6), ("openrlhf", 1e-9)])
def test_grpo_against_peers(package: str, eps: float) -> None:
    """All three divide by the sample's deviation; they differ in what they add to it."""
    expected = _per_rollout(peer(package)["advantages/grpo"]["value"])
    advantages = group_normalized(recorded()["group_rewards"], GROUP_IDS, eps=eps)
    torch.testing.assert_close(advantages, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("with_kl", [False, True])
@pytest.mark.parametrize("package", ["verl", "openrlhf"])
def test_reinforce_pp_against_peers(package: str, with_kl: bool) -> None:
    """verl divides by the sample's deviation over the 21 tokens, OpenRLHF (the authors') and we by the population's."""
    record, mask = recorded(), recorded()["mask"].bool()
    values = per_token(uncentered(record["group_rewards"], GROUP_IDS), LENGTHS)
    if with_kl:
        values = values - 0.05 * kl_to_go(record["proximal_logprobs"][mask], record["ref_logprobs"][mask], LENGTHS)
    case = "advantages/reinforce_pp_kl" if with_kl else "advantages/reinforce_pp"
    expected = torch.tensor(peer(package)[case]["value"])[mask]
    ours = batch_normalized(values) * (math.sqrt(20 / 21) if package == "verl" else 1.0)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("package", ["verl", "openrlhf"])
def test_reinforce_pp_baseline_against_peers(package: str) -> None:
    values = per_token(group_centered(recorded()["group_rewards"], GROUP_IDS), LENGTHS)
    expected = torch.tensor(peer(package)["advantages/reinforce_pp_baseline"]["value"])[recorded()["mask"].bool()]
    ours = batch_normalized(values) * (math.sqrt(20 / 21) if package == "verl" else 1.0)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def test_kl_in_reward_after_the_baseline_against_openrlhf() -> None:
    """RLOO with KL in the reward: OpenRLHF subtracts it per token and to go, after the baseline, as we do.

    TRL subtracts a rollout's whole KL from its reward before the baseline. Both have the same expected gradient.
    """
    record, mask = recorded(), recorded()["mask"].bool()
    values = per_token(leave_one_out(record["group_rewards"], GROUP_IDS), LENGTHS)
    values = values - 0.05 * kl_to_go(record["proximal_logprobs"][mask], record["ref_logprobs"][mask], LENGTHS)
    expected = torch.tensor(peer("openrlhf")["advantages/rloo_kl"]["value"])[mask]
    torch.testing.assert_close(values, expected, rtol=1e-6, atol=1e-7)


def test_refuses_what_is_not_a_reward() -> None:
    with pytest.raises(ConfigError, match="must be finite"):
        group_centered(torch.tensor([1.0, math.nan]), torch.tensor([0, 0]))
    with pytest.raises(ConfigError, match="flat and of equal length"):
        group_centered(torch.tensor([1.0, 2.0]), torch.tensor([0]))


def _per_rollout(value: list[object]) -> Tensor:
    """Peers return one advantage per rollout, or the same one on each of its tokens."""
    tensor = torch.tensor(value)
    return tensor if tensor.ndim == 1 else tensor[:, 0]
