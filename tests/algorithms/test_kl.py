"""KL estimators: by hand, their expected value and gradient over a small vocabulary, and against verl and OpenRLHF."""

from __future__ import annotations

import math

import pytest
import torch

from framework.algorithms.base import LossInputs, LossOutput
from framework.algorithms.kl import KL_ESTIMATORS, KLEstimator, k1, k2, k3
from tests.algorithms.loss_cases import assert_same_as, peer, recorded_inputs

POLICY_LOGITS = torch.tensor([0.3, -1.0, 0.8, 0.1], dtype=torch.float64)
REF_LOGPROBS = torch.log_softmax(torch.tensor([-0.2, 0.4, 0.5, -0.6], dtype=torch.float64), 0)


def test_estimators_by_hand() -> None:
    """d = lp - ref = 0.5: k1 = 0.5, k2 = 0.125, k3 = exp(-0.5) - 1 + 0.5 = 0.10653."""
    logprobs, ref = torch.tensor([-1.0]), torch.tensor([-1.5])
    assert k1(logprobs, ref).item() == pytest.approx(0.5)
    assert k2(logprobs, ref).item() == pytest.approx(0.125)
    assert k3(logprobs, ref).item() == pytest.approx(math.exp(-0.5) - 0.5)


def expected_value_and_gradient(estimator: KLEstimator) -> tuple[float, torch.Tensor]:
    """Over all four tokens, weighted by the policy's probabilities held fixed, as sampling holds them."""
    logits = POLICY_LOGITS.clone().requires_grad_(True)
    logprobs = torch.log_softmax(logits, 0)
    value = (logprobs.detach().exp() * estimator(logprobs, REF_LOGPROBS)).sum()
    (gradient,) = torch.autograd.grad(value, logits)
    return value.item(), gradient


def true_kl_gradient(*, reverse: bool) -> tuple[float, torch.Tensor]:
    """KL(policy || ref) or, not reversed, KL(ref || policy), by automatic differentiation of its definition."""
    logits = POLICY_LOGITS.clone().requires_grad_(True)
    logprobs = torch.log_softmax(logits, 0)
    p, q = (logprobs, REF_LOGPROBS) if reverse else (REF_LOGPROBS, logprobs)
    value = (p.exp() * (p - q)).sum()
    (gradient,) = torch.autograd.grad(value, logits)
    return value.item(), gradient


def test_k1_and_k3_are_unbiased_values_and_k2_is_not() -> None:
    truth, _ = true_kl_gradient(reverse=True)
    assert expected_value_and_gradient(k1)[0] == pytest.approx(truth)
    assert expected_value_and_gradient(k3)[0] == pytest.approx(truth)
    assert abs(expected_value_and_gradient(k2)[0] - truth) > 0.01


def test_gradients_as_losses_are_those_the_module_states() -> None:
    """Tang and Munos 2025: k1 none, k2 the reverse KL's, k3 the forward KL's."""
    torch.testing.assert_close(expected_value_and_gradient(k1)[1], torch.zeros(4, dtype=torch.float64))
    torch.testing.assert_close(expected_value_and_gradient(k2)[1], true_kl_gradient(reverse=True)[1])
    torch.testing.assert_close(expected_value_and_gradient(k3)[1], true_kl_gradient(reverse=False)[1])


@pytest.mark.parametrize("name", ["k1", "k2", "k3"])
@pytest.mark.parametrize("package", ["verl", "openrlhf"])
def test_against_peers(package: str, name: str) -> None:
    """The sum over all tokens. OpenRLHF computes in float32. Both clamp k3 at 10, which these inputs do not reach."""

    def loss(inputs: LossInputs) -> LossOutput:
        return LossOutput(per_token=KL_ESTIMATORS[name](inputs.logprobs, inputs.fields["ref_logprobs"]))

    inputs = recorded_inputs("sum", fields=("ref_logprobs",))
    assert_same_as(peer(package)[f"kl/{name}"], loss, inputs, tolerance=1e-6)
