"""The tinker losses: by hand from the protocol's table (sums over tokens), two of them also against verl."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from framework.algorithms.base import LossFn
from framework.algorithms.tinker import TINKER_LOSSES, MaskedGSPO, RatioCISPO, RatioClip, tinker_loss
from framework.errors import ConfigError
from tests.algorithms.loss_cases import assert_loss, assert_same_as, by_hand, peer, recorded_inputs

LOG = math.log
RL = frozenset({"sampling_logprobs", "advantages"})


def test_cross_entropy_is_minus_the_weighted_logprob() -> None:
    weighted = tinker_loss("cross_entropy", fields=frozenset({"weights"}), config={})
    inputs = by_hand([[-1.0, -2.0]], weights=[[0.0, -3.0]])
    assert_loss(weighted, inputs, loss=[0.0, -6.0], gradient=[0.0, 3.0])
    plain = tinker_loss("cross_entropy", fields=frozenset(), config={})
    assert_loss(plain, inputs, loss=[1.0, 2.0], gradient=[-1.0, -1.0])


@pytest.mark.parametrize(
    ("name", "config", "loss", "gradient"),
    [
        # r = 1.5, 0.5, 1.1; A = 2, -1, 1; lp = ln r, q = 0
        ("importance_sampling", {}, [-3.0, 0.5, -1.1], [-3.0, 0.5, -1.1]),
        # clip(r, 0.8, 1.2) A = 2.4, -0.8, 1.1; -min(rA, .) = -2.4, 0.8, -1.1; clipped tokens have no gradient
        ("ppo", {}, [-2.4, 0.8, -1.1], [0.0, 0.0, -1.1]),
        # bounds of the ratio, not distances from 1: clip(r, 0.4, 1.05) A = 2.1, -0.5, 1.05
        (
            "ppo",
            {"clip_low_threshold": 0.4, "clip_high_threshold": 1.05},
            [-2.1, 0.5, -1.05],
            [0.0, 0.5, 0.0],
        ),
        # -clip(r) A lp: -1.2 * 2 * ln 1.5, 0.8 * ln 0.5, -1.1 * ln 1.1; gradient -clip(r) A
        ("cispo", {}, [-2.4 * LOG(1.5), 0.8 * LOG(0.5), -1.1 * LOG(1.1)], [-2.4, 0.8, -1.1]),
        # -(A lp - 0.05 lp^2) with beta 0.1; gradient -A + 0.1 lp
        (
            "dro",
            {"beta": 0.1},
            [-2 * LOG(1.5) + 0.05 * LOG(1.5) ** 2, LOG(0.5) + 0.05 * LOG(0.5) ** 2, -LOG(1.1) + 0.05 * LOG(1.1) ** 2],
            [-2 + 0.1 * LOG(1.5), 1 + 0.1 * LOG(0.5), -1 + 0.1 * LOG(1.1)],
        ),
    ],
)
def test_policy_losses_by_hand(name: str, config: dict[str, float], loss: list[float], gradient: list[float]) -> None:
    inputs = by_hand([[LOG(1.5), LOG(0.5), LOG(1.1)]], sampling_logprobs=[[0.0] * 3], advantages=[[2.0, -1.0, 1.0]])
    assert_loss(tinker_loss(name, fields=RL, config=config), inputs, loss=loss, gradient=gradient)


def test_gspo_by_hand() -> None:
    """s = exp(mean over the mask): prompt positions (mask 0, A 0) do not count in the mean."""
    # Two masked-in tokens with log ratios ln 1.2, ln 0.9: s = sqrt(1.08) = 1.0392, inside [0.8, 1.2], A = 2.
    s = math.sqrt(1.08)
    inputs = by_hand(
        [[5.0, LOG(1.2), LOG(0.9)]],
        sampling_logprobs=[[0.0, 0.0, 0.0]],
        advantages=[[0.0, 2.0, 2.0]],
        sequence_ratio_mask=[[0.0, 1.0, 1.0]],
    )
    loss = tinker_loss("gspo", fields=RL | {"sequence_ratio_mask"}, config={})
    assert_loss(loss, inputs, loss=[0.0, -2 * s, -2 * s], gradient=[0.0, -2 * s, -2 * s])


@pytest.mark.parametrize(
    ("case", "loss"),
    [
        ("loss/ppo_clip/token_mean", RatioClip(low=0.8, high=1.28)),
        ("loss/cispo/token_mean", RatioCISPO(low=0.8, high=1.28)),
        ("loss/gspo/token_mean", MaskedGSPO(low=0.9, high=1.15)),
    ],
)
def test_against_verl(case: str, loss: LossFn) -> None:
    """With verl's old logprobs as the sampler's, and weights that turn the protocol's sum into verl's mean."""
    inputs = recorded_inputs("token_mean", fields=("proximal_logprobs",))
    fields = {
        "advantages": inputs.advantages,
        "sampling_logprobs": inputs.fields["proximal_logprobs"],
        "sequence_ratio_mask": torch.ones_like(inputs.advantages),
    }
    assert_same_as(peer("verl")[case], loss, dataclasses.replace(inputs, fields=fields))


@pytest.mark.parametrize(
    ("name", "fields", "config", "message"),
    [
        ("stable_reinforce", RL, {}, "'stable_reinforce' is not supported; one of cross_entropy"),
        ("ppo", {"advantages"}, {}, r"missing \['sampling_logprobs'\]"),
        ("ppo", RL | {"weights"}, {}, r"unknown \['weights'\]"),
        ("dro", RL | {"proximal_logprobs"}, {}, r"unknown \['proximal_logprobs'\]"),
        ("gspo", RL, {}, r"missing \['sequence_ratio_mask'\]"),
        ("ppo", RL, {"clip_low": 0.2}, r"keys of 'ppo' are \['clip_high_threshold', 'clip_low_threshold'\]"),
        ("ppo", RL, {"clip_low_threshold": 1.3}, "0 <= low <= high"),
        ("dro", RL, {"beta": -1.0}, "beta=-1.0"),
    ],
)
def test_refuses(name: str, fields: frozenset[str], config: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tinker_loss(name, fields=frozenset(fields), config=config)


def test_every_default_builds() -> None:
    for name, loss in TINKER_LOSSES.items():
        assert callable(tinker_loss(name, fields=frozenset(loss.fields), config={}))
