"""Overlong penalty, overlong filter and dynamic sampling: by hand from DAPO, the penalty also against peers."""

from __future__ import annotations

import pytest
import torch

from framework.algorithms.reward_shaping import is_informative, overlong_penalty, without_loss_if_truncated
from framework.errors import ConfigError
from framework.types import Rollout, RolloutGroup, StopReason
from tests.algorithms.loss_cases import peer


def rollout(reward: float, stop_reason: StopReason = "stop") -> Rollout:
    return Rollout(
        token_ids=(1, 2, 3),
        loss_mask=(False, True, True),
        sampling_logprobs=(0.0, -0.5, -0.25),
        reward=reward,
        adapter=None,
        stop_reason=stop_reason,
    )


def test_overlong_penalty_by_hand() -> None:
    """DAPO eq. 13 with its numbers: L_max 20480, L_cache 4096, so the ramp starts at 16384."""
    lengths = torch.tensor([0, 16384, 17408, 18432, 20480, 99999])
    penalty = overlong_penalty(lengths, max_tokens=20480, buffer_tokens=4096)
    # (16384 - 17408) / 4096 = -0.25; (16384 - 18432) / 4096 = -0.5; -1 at 20480 and beyond
    assert penalty.tolist() == [0.0, 0.0, -0.25, -0.5, -1.0, -1.0]


@pytest.mark.parametrize("package", ["verl", "openrlhf"])
def test_overlong_penalty_against_peers(package: str) -> None:
    penalty = overlong_penalty(torch.arange(1, 7), max_tokens=6, buffer_tokens=4, factor=0.5)
    assert penalty.tolist() == peer(package)["overlong_penalty"]["value"]


def test_overlong_penalty_refuses_a_ramp_longer_than_the_limit() -> None:
    with pytest.raises(ConfigError, match="4096 tokens"):
        overlong_penalty(torch.tensor([1]), max_tokens=256, buffer_tokens=4096)


def test_only_truncated_rollouts_lose_their_loss() -> None:
    finished, cut = rollout(1.0), rollout(0.0, "length")
    assert without_loss_if_truncated(finished) is finished
    filtered = without_loss_if_truncated(cut)
    assert filtered.loss_mask == (False, False, False)
    assert (filtered.token_ids, filtered.reward, filtered.stop_reason) == ((1, 2, 3), 0.0, "length")


@pytest.mark.parametrize(
    ("rewards", "informative"),
    [((1.0, 1.0, 1.0), False), ((0.0, 0.0), False), ((0.0, 1.0, 0.0), True), ((0.3, 0.3001), True), ((1.0,), False)],
)
def test_is_informative(rewards: tuple[float, ...], informative: bool) -> None:
    group = RolloutGroup(rollouts=tuple(rollout(reward) for reward in rewards), problem_id="toy/0")
    assert is_informative(group) is informative
