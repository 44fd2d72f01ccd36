"""Per-sequence sums and means of flat token values."""

from __future__ import annotations

import torch

from framework.algorithms.base import sequence_mean, sequence_sum, token_metric
from tests.algorithms.loss_cases import by_hand


def test_sequence_sum_and_mean() -> None:
    inputs = by_hand([[0.0, 0.0, 0.0], [], [0.0]])
    values = torch.tensor([1.0, 2.0, 6.0, -4.0], requires_grad=True)
    assert sequence_sum(values, inputs).tolist() == [9.0, 0.0, -4.0]
    assert sequence_mean(values, inputs).tolist() == [3.0, 0.0, -4.0]
    (gradient,) = torch.autograd.grad((sequence_mean(values, inputs) * torch.tensor([1.0, 5.0, 2.0])).sum(), values)
    assert torch.allclose(gradient, torch.tensor([1 / 3, 1 / 3, 1 / 3, 2.0]))


def test_token_metric() -> None:
    metric = token_metric(torch.tensor([1.0, 2.0], requires_grad=True))
    assert (float(metric.sum), metric.count) == (3.0, 2.0)
    assert isinstance(metric.sum, torch.Tensor)
    assert not metric.sum.requires_grad
