"""Cross entropy and on-policy distillation: by hand, and against torch, OpenRLHF, TRL and verl."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from framework.algorithms.base import LossInputs
from framework.algorithms.supervised import (
    CrossEntropy,
    OnPolicyDistillation,
    WeightedCrossEntropy,
    reverse_kl_advantages,
)
from tests.algorithms.loss_cases import assert_same_as, by_hand, peer, recorded, recorded_inputs, value_and_gradient


def test_cross_entropy_by_hand() -> None:
    inputs = by_hand([[-1.0, -2.5]])
    assert value_and_gradient(CrossEntropy(), inputs) == ([1.0, 2.5], [-1.0, -1.0])
    assert float(CrossEntropy()(inputs).metrics["loss/cross_entropy"].sum) == 3.5


def test_weighted_cross_entropy_by_hand() -> None:
    inputs = by_hand([[-1.0, -2.5, -4.0]], weights=[[0.5, -2.0, 0.0]])
    assert value_and_gradient(WeightedCrossEntropy(), inputs) == ([0.5, -5.0, 0.0], [-0.5, 2.0, 0.0])


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
def test_cross_entropy_against_openrlhf(aggregation: str) -> None:
    inputs = recorded_inputs(aggregation, fields=())  # type: ignore[arg-type]
    assert_same_as(peer("openrlhf")[f"loss/cross_entropy/{aggregation}"], CrossEntropy(), inputs)


def test_cross_entropy_against_torch() -> None:
    """torch's own mean over positions of logits and targets, from the same logits."""
    logits = torch.randn(7, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    targets = torch.tensor([0, 3, 10, 4, 4, 1, 9])
    logprobs = torch.log_softmax(logits, -1).gather(1, targets[:, None])[:, 0]
    loss = CrossEntropy()(by_hand([logprobs.tolist()])).per_token.mean()
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, targets))


def test_distillation_by_hand() -> None:
    """A = teacher - sampling; L = -r A with r = exp(lp - sampling)."""
    # token 0: A = -0.5 + 2 = 1.5, r = 1; token 1: A = -3 + 1 = -2, r = e^0.5.
    inputs = by_hand([[-2.0, -0.5]], sampling_logprobs=[[-2.0, -1.0]], teacher_logprobs=[[-0.5, -3.0]])
    r = math.exp(0.5)
    loss, gradient = value_and_gradient(OnPolicyDistillation(), inputs)
    assert loss == pytest.approx([-1.5, 2 * r])
    assert gradient == pytest.approx([-1.5, 2 * r])
    assert float(OnPolicyDistillation()(inputs).metrics["policy/reverse_kl"].sum) == pytest.approx(0.5)
    advantages = reverse_kl_advantages(inputs.sampling_logprobs, inputs.fields["teacher_logprobs"])
    assert advantages.tolist() == pytest.approx([1.5, -2.0])


def test_expected_gradient_is_the_reverse_kl_gradient() -> None:
    """Over a vocabulary of four, weighted by the student's probabilities: the gradient of KL(student || teacher)."""
    start = torch.tensor([0.3, -1.0, 0.8, 0.1], dtype=torch.float64)
    teacher = torch.log_softmax(torch.tensor([1.0, 0.4, -0.5, 0.2], dtype=torch.float64), 0)
    logits = start.clone().requires_grad_(True)
    student = torch.log_softmax(logits, 0)
    (truth,) = torch.autograd.grad((student.exp() * (student - teacher)).sum(), logits)
    logits = start.clone().requires_grad_(True)
    student = torch.log_softmax(logits, 0)
    fixed = student.detach()
    per_token = -torch.exp(student - fixed) * reverse_kl_advantages(fixed, teacher)
    (ours,) = torch.autograd.grad((fixed.exp() * per_token).sum(), logits)
    torch.testing.assert_close(ours, truth)


def on_policy_inputs() -> LossInputs:
    """The recorded batch as if the student now had sampled it."""
    inputs = recorded_inputs("token_mean", fields=("teacher_logprobs",))
    return dataclasses.replace(inputs, fields={**inputs.fields, "sampling_logprobs": inputs.logprobs.detach()})


def test_distillation_against_verl() -> None:
    """verl's k1 estimator as reward of a policy gradient, with the student's logprobs now as its old ones."""
    inputs = on_policy_inputs()
    assert_same_as(peer("verl")["distill/token_mean"], OnPolicyDistillation(), inputs)


def test_distillation_against_trl() -> None:
    """TRL's loss is -lp A, not -r A: at r = 1 another value with the same gradient."""
    inputs = on_policy_inputs()
    total = (OnPolicyDistillation()(inputs).per_token * inputs.weights).sum()
    (gradient,) = torch.autograd.grad(total, inputs.logprobs)
    expected = torch.tensor(peer("trl")["distill/token_mean"]["gradient"], dtype=torch.float64)
    torch.testing.assert_close(gradient, expected[recorded()["mask"].bool()], rtol=2e-7, atol=2e-7)
