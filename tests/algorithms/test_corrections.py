"""Corrections: by hand from their definitions, then against TRL, verl and OpenRLHF."""

from __future__ import annotations

import math

import pytest
import torch

from framework.algorithms.corrections import (
    Correction,
    GeometricMask,
    IcePop,
    OffPolicyMask,
    SequenceMaskedImportance,
    TruncatedImportance,
)
from framework.errors import ConfigError
from tests.algorithms.loss_cases import by_hand, peer, recorded, recorded_inputs

LOG = math.log
RATIOS = by_hand(
    [[-1.0, -1.0, -1.0], [-1.0, -1.0]],
    proximal_logprobs=[[LOG(4.0), LOG(0.5), LOG(0.4)], [LOG(1.5), LOG(0.96)]],
    sampling_logprobs=[[0.0, 0.0, 0.0], [0.0, 0.0]],
    advantages=[[1.0, 1.0, 1.0], [-1.0, -1.0]],
)
"""k = 4, 0.5, 0.4 in sequence 0 (product 0.8, geometric mean 0.9283), 1.5, 0.96 in sequence 1 (1.44, 1.2)."""


@pytest.mark.parametrize(
    ("correction", "expected"),
    [
        (TruncatedImportance(high=2.0), [2.0, 0.5, 0.4, 1.5, 0.96]),
        (IcePop(low=0.5, high=3.0), [0.0, 0.5, 0.0, 1.5, 0.96]),
        (SequenceMaskedImportance(low=0.0, high=1.4), [0.8, 0.8, 0.8, 0.0, 0.0]),
        (SequenceMaskedImportance(low=0.9, high=1.5), [0.0, 0.0, 0.0, 1.44, 1.44]),
        (GeometricMask(low=0.9, high=1.1), [1.0, 1.0, 1.0, 0.0, 0.0]),
        (GeometricMask(low=0.95, high=1.3), [0.0, 0.0, 0.0, 1.0, 1.0]),
    ],
)
def test_multipliers_by_hand(correction: Correction, expected: list[float]) -> None:
    output = correction(RATIOS)
    assert output.multipliers.tolist() == pytest.approx(expected)
    assert not output.multipliers.requires_grad
    assert float(output.metrics["policy/correction_masked_fraction"].sum) == expected.count(0.0)
    assert float(output.metrics["policy/correction_multiplier"].sum) == pytest.approx(sum(expected))


def test_truncated_fraction() -> None:
    assert float(TruncatedImportance(high=1.45)(RATIOS).metrics["policy/correction_truncated_fraction"].sum) == 2.0


def test_off_policy_mask_by_hand() -> None:
    """DeepSeek-V3.2: only sequences of negative advantage whose mean(sampling - now) exceeds the bound are dropped."""
    # Drifts: 0.3, 0.3, 0.05, and (0.5 - 0.1) / 2 = 0.2; advantages +, -, -, -; bound 0.1.
    inputs = by_hand(
        [[-1.3], [-1.3], [-1.05], [-1.5, -0.9]],
        sampling_logprobs=[[-1.0], [-1.0], [-1.0], [-1.0, -1.0]],
        advantages=[[1.0], [-1.0], [-1.0], [-1.0, -1.0]],
    )
    output = OffPolicyMask(high=0.1)(inputs)
    assert output.multipliers.tolist() == [1.0, 0.0, 1.0, 0.0, 0.0]
    assert not output.multipliers.requires_grad


@pytest.mark.parametrize(
    ("package", "case", "correction"),
    [
        ("trl", "correction/truncated_importance", TruncatedImportance(high=1.3)),
        ("verl", "correction/truncated_importance", TruncatedImportance(high=1.3)),
        ("openrlhf", "correction/truncated_importance", TruncatedImportance(high=1.3)),
        ("trl", "correction/icepop", IcePop(low=0.7, high=1.4)),
        ("verl", "correction/icepop", IcePop(low=0.7, high=1.4)),
        ("openrlhf", "correction/icepop", IcePop(low=0.7, high=1.4)),
        ("trl", "correction/sequence_masked_importance", SequenceMaskedImportance(low=0.5, high=1.6)),
        ("verl", "correction/sequence_masked_importance", SequenceMaskedImportance(low=0.5, high=1.6)),
        # verl's rejection bounds sampling / proximal in [0.88, 1.3], the inverse of the ratio we bound.
        ("verl", "correction/geometric_mask", GeometricMask(low=1 / 1.3, high=1 / 0.88)),
    ],
)
def test_against_peers(package: str, case: str, correction: Correction) -> None:
    expected = torch.tensor(peer(package)[case]["value"], dtype=torch.float64)[recorded()["mask"].bool()]
    inputs = recorded_inputs("sum", fields=("proximal_logprobs", "sampling_logprobs"))
    torch.testing.assert_close(correction(inputs).multipliers, expected, rtol=1e-6, atol=1e-6)
    assert 0 < expected.count_nonzero() < 21 or "truncated" in case


def test_geometric_mask_against_openrlhf() -> None:
    """OpenRLHF keeps the same sequences, and multiplies their tokens by k besides, where we and verl use 1."""
    expected = torch.tensor(peer("openrlhf")["correction/geometric_mask_times_ratio"]["value"], dtype=torch.float64)
    inputs = recorded_inputs("sum", fields=("proximal_logprobs", "sampling_logprobs"))
    mask = GeometricMask(low=1 / 1.3, high=1 / 0.88)(inputs).multipliers
    ratio = (inputs.fields["proximal_logprobs"] - inputs.sampling_logprobs).exp()
    torch.testing.assert_close(mask * ratio, expected[recorded()["mask"].bool()], rtol=1e-6, atol=1e-6)


def test_refuses_an_empty_range() -> None:
    with pytest.raises(ConfigError, match=r"correction_low=2\.0, algorithm\.correction_high=1\.0"):
        IcePop(low=2.0, high=1.0)
    with pytest.raises(ConfigError, match="greater than 0 nats"):
        OffPolicyMask(high=0.0)
