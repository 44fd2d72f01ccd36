"""Train/sample mismatch: by hand from NeMo-RL's published formulas, gen_kl_error also against verl's k3."""

from __future__ import annotations

import math

import pytest
import torch

from framework.algorithms.base import Metric
from framework.algorithms.mismatch import measure_mismatch
from tests.algorithms.loss_cases import peer, recorded


def mean(metric: Metric) -> float:
    return float(metric.sum) / float(metric.count)


def test_by_hand() -> None:
    """d = 0.5, -0.25: mean |d| 0.375, max 0.5; mean exp |d|; mean exp(d) - 1 - d."""
    mismatch = measure_mismatch(torch.tensor([-1.0, -2.25]), torch.tensor([-1.5, -2.0]))
    assert mean(mismatch.means["parity/logprob_abs_diff_mean"]) == pytest.approx(0.375)
    assert mismatch.maxima["parity/logprob_abs_diff_max"] == 0.5
    error = (math.exp(0.5) + math.exp(0.25)) / 2
    assert mean(mismatch.means["parity/token_mult_prob_error"]) == pytest.approx(error)
    kl = (math.exp(0.5) - 1.5 + math.exp(-0.25) - 0.75) / 2
    assert mean(mismatch.means["parity/gen_kl_error"]) == pytest.approx(kl)


def test_the_largest_difference_has_no_sign() -> None:
    mismatch = measure_mismatch(torch.tensor([-1.0, -3.0]), torch.tensor([-1.5, -1.0]))
    assert mismatch.maxima["parity/logprob_abs_diff_max"] == 2.0


def test_equal_logprobs() -> None:
    mismatch = measure_mismatch(torch.tensor([-1.0, -2.0]), torch.tensor([-1.0, -2.0]))
    assert [mean(metric) for metric in mismatch.means.values()] == [0.0, 0.0, 1.0]
    assert mismatch.maxima == {"parity/logprob_abs_diff_max": 0.0}


def test_gen_kl_error_against_verl() -> None:
    record, mask = recorded(), recorded()["mask"].bool()
    mismatch = measure_mismatch(record["logprobs"][mask], record["sampling_logprobs"][mask])
    expected = peer("verl")["parity/gen_kl_error"]["value"]
    assert mean(mismatch.means["parity/gen_kl_error"]) == pytest.approx(expected)
