"""The composed loss: by hand, and against TRL, verl and OpenRLHF with KL, entropy and corrections."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from framework.algorithms.composition import ComposedLoss, KLTerm
from framework.algorithms.corrections import (
    Correction,
    IcePop,
    OffPolicyMask,
    SequenceMaskedImportance,
    TruncatedImportance,
)
from framework.algorithms.kl import k2, k3
from framework.algorithms.losses import ImportanceSampling, PPOClip
from tests.algorithms.loss_cases import assert_same_as, by_hand, peer, recorded_inputs, value_and_gradient

PPO = PPOClip(clip_low=0.2, clip_high=0.28)


def test_terms_by_hand() -> None:
    """multiplier * (-r A) + coef * (lp - ref)^2 / 2 - entropy_coef * H."""
    # lp = -1, proximal = -1, sampling = -1 - ln 1.5: r = 1, k = 1.5, A = 2, ref = -1.4, H = 0.7.
    # -1.5 * 2 + 0.1 * 0.08 - 0.01 * 0.7 = -2.999; gradient -1.5 * 2 + 0.1 * 0.4 = -2.96
    loss = ComposedLoss(
        policy=ImportanceSampling(),
        correction=TruncatedImportance(high=2.0),
        kl=KLTerm(coef=0.1, estimator=k2),
        entropy_coef=0.01,
    )
    inputs = by_hand(
        [[-1.0]],
        proximal_logprobs=[[-1.0]],
        sampling_logprobs=[[-1.0 - math.log(1.5)]],
        ref_logprobs=[[-1.4]],
        advantages=[[2.0]],
        entropy=[[0.7]],
    )
    value, gradient = value_and_gradient(loss, inputs)
    assert value == pytest.approx([-2.999])
    assert gradient == pytest.approx([-2.96])
    metrics = loss(inputs).metrics
    assert float(metrics["policy/entropy"].sum) == pytest.approx(0.7)
    assert float(metrics["policy/ref_kl"].sum) == pytest.approx(0.08)
    assert float(metrics["policy/correction_multiplier"].sum) == pytest.approx(1.5)


def test_entropy_carries_gradient() -> None:
    entropy = torch.tensor([0.5, 0.6], dtype=torch.float64, requires_grad=True)
    inputs = by_hand([[-1.0, -1.0]], sampling_logprobs=[[-1.0, -1.0]], advantages=[[0.0, 0.0]])
    inputs = dataclasses.replace(inputs, entropy=entropy)
    per_token = ComposedLoss(policy=ImportanceSampling(), entropy_coef=0.3)(inputs).per_token
    (gradient,) = torch.autograd.grad(per_token.sum(), entropy)
    assert gradient.tolist() == pytest.approx([-0.3, -0.3])


def test_without_proximal_logprobs_a_correction_splits_the_ratio_at_the_logprobs_now() -> None:
    """r = 1 with the gradient of lp; the multiplier is min(exp(lp - sampling), cap), not applied twice."""
    inputs = by_hand([[-1.0]], sampling_logprobs=[[-1.0 - math.log(1.5)]], advantages=[[2.0]])
    corrected = ComposedLoss(policy=PPO, correction=TruncatedImportance(high=2.0))
    value, gradient = value_and_gradient(corrected, inputs)
    assert value == pytest.approx([-3.0])
    assert gradient == pytest.approx([-3.0])
    # Without a correction the same sample is outside the clip range, and teaches nothing.
    assert value_and_gradient(ComposedLoss(policy=PPO), inputs)[1] == [0.0]


def test_a_masked_token_keeps_its_kl() -> None:
    inputs = by_hand([[-1.0]], sampling_logprobs=[[-9.0]], ref_logprobs=[[-2.0]], advantages=[[2.0]])
    loss = ComposedLoss(policy=PPO, correction=IcePop(), kl=KLTerm(coef=1.0, estimator=k2))
    value, gradient = value_and_gradient(loss, inputs)
    assert value == pytest.approx([0.5])
    assert gradient == pytest.approx([1.0])


@pytest.mark.parametrize("package", ["trl", "verl", "openrlhf"])
def test_truncated_importance_against_peers(package: str) -> None:
    loss = ComposedLoss(policy=PPO, correction=TruncatedImportance(high=1.3))
    inputs = recorded_inputs("token_mean", fields=("proximal_logprobs", "sampling_logprobs"))
    assert_same_as(peer(package)["loss/ppo_clip/truncated_importance"], loss, inputs)


@pytest.mark.parametrize(
    ("package", "case", "correction"),
    [
        ("trl", "icepop", IcePop(low=0.7, high=1.4)),
        ("verl", "icepop", IcePop(low=0.7, high=1.4)),
        ("openrlhf", "icepop", IcePop(low=0.7, high=1.4)),
        ("trl", "sequence_masked_importance", SequenceMaskedImportance(low=0.5, high=1.6)),
        ("verl", "sequence_masked_importance", SequenceMaskedImportance(low=0.5, high=1.6)),
    ],
)
def test_masking_corrections_against_peers(package: str, case: str, correction: Correction) -> None:
    """The corrected loss and its gradient; the multipliers alone are in test_corrections.py."""
    inputs = recorded_inputs("token_mean", fields=("proximal_logprobs", "sampling_logprobs"))
    assert_same_as(peer(package)[f"loss/ppo_clip/{case}"], ComposedLoss(policy=PPO, correction=correction), inputs)


def test_off_policy_mask_against_trl() -> None:
    loss = ComposedLoss(policy=PPO, correction=OffPolicyMask(high=0.05))
    inputs = recorded_inputs("token_mean", fields=("proximal_logprobs", "sampling_logprobs"))
    assert_same_as(peer("trl")["loss/ppo_clip/off_policy_mask"], loss, inputs)


def test_kl_in_loss_against_trl() -> None:
    loss = ComposedLoss(policy=PPO, kl=KLTerm(coef=0.04, estimator=k3))
    inputs = recorded_inputs("sequence_mean", fields=("proximal_logprobs", "ref_logprobs"))
    assert_same_as(peer("trl")["loss/ppo_clip/kl_k3"], loss, inputs)


def test_kl_in_loss_against_verl() -> None:
    """verl's kl term follows the aggregation too. With entropy in it the bonus does as well; its value is compared."""
    inputs = recorded_inputs("sequence_mean", fields=("proximal_logprobs", "ref_logprobs"))
    loss = ComposedLoss(policy=PPO, kl=KLTerm(coef=0.04, estimator=k3))
    assert_same_as(peer("verl")["loss/ppo_clip/kl_k3_sequence_mean"], loss, inputs)
    inputs = recorded_inputs("token_mean", fields=("proximal_logprobs", "ref_logprobs"))
    loss = ComposedLoss(policy=PPO, kl=KLTerm(coef=0.04, estimator=k2), entropy_coef=0.01)
    assert_same_as(peer("verl")["loss/ppo_clip/kl_k2_entropy"], loss, inputs)


def test_entropy_bonus_against_trl() -> None:
    """TRL averages the bonus over tokens whatever the loss's own mean; ours follows the aggregation, here the same."""
    assert_same_as(
        peer("trl")["loss/ppo_clip/entropy"], ComposedLoss(policy=PPO, entropy_coef=0.01), recorded_inputs("token_mean")
    )
