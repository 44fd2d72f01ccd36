"""Ratios and their denominators."""

from __future__ import annotations

import math

import pytest
import torch

from framework.algorithms.ratios import behaviour_logprobs, sequence_ratio, token_ratio, with_proximal
from tests.algorithms.loss_cases import by_hand


def test_the_denominator_is_proximal_else_sampling() -> None:
    assert behaviour_logprobs(by_hand([[0.0]], sampling_logprobs=[[-3.0]])).tolist() == [-3.0]
    both = by_hand([[0.0]], sampling_logprobs=[[-3.0]], proximal_logprobs=[[-2.0]])
    assert behaviour_logprobs(both).tolist() == [-2.0]
    with pytest.raises(KeyError, match="sampling_logprobs"):
        behaviour_logprobs(by_hand([[0.0]]))


def test_with_proximal_keeps_what_was_recorded_and_else_takes_now() -> None:
    recorded = by_hand([[-1.0]], proximal_logprobs=[[-2.0]])
    assert with_proximal(recorded) is recorded
    filled = with_proximal(by_hand([[-1.0]], sampling_logprobs=[[-3.0]]))
    assert filled.fields["proximal_logprobs"].tolist() == [-1.0]
    assert not filled.fields["proximal_logprobs"].requires_grad
    assert filled.logprobs.requires_grad


def test_ratios_by_hand() -> None:
    # log ratios ln 2, ln 0.5, ln 3 in one sequence, 25 nats in another: clamped at 20.
    inputs = by_hand([[math.log(2), math.log(0.5), math.log(3)], [25.0]])
    zeros = torch.zeros(4, dtype=torch.float64)
    assert token_ratio(inputs.logprobs, zeros).tolist() == pytest.approx([2.0, 0.5, 3.0, math.exp(20)])
    root = 3 ** (1 / 3)
    assert sequence_ratio(inputs.logprobs, zeros, inputs).tolist() == pytest.approx([root, root, root, math.exp(20)])
