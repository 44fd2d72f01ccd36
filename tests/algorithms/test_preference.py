"""DPO: by hand from its equation 7, then against TRL and OpenRLHF."""

from __future__ import annotations

import math

import pytest

from framework.algorithms.preference import DPO
from framework.errors import ConfigError
from tests.algorithms.loss_cases import assert_same_as, by_hand, peer, recorded_inputs, value_and_gradient


def sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x))


def test_dpo_by_hand() -> None:
    """-log sigma(beta (log ratio chosen - log ratio rejected)); dL/dlp = -+ beta sigma(-beta margin)."""
    # chosen: (-1 + 1.5) + (-2 + 2.25) = 0.75; rejected: -1 + 0.5 = -0.5; margin 1.25, beta 2: z = 2.5.
    # L = -log sigma(2.5) on each of the three tokens.
    # The three tokens' losses are summed with weights 1 here, so the gradient is three times the pair's.
    inputs = by_hand([[-1.0, -2.0], [-1.0]], ref_logprobs=[[-1.5, -2.25], [-0.5]])
    loss, gradient = value_and_gradient(DPO(beta=2.0), inputs)
    slope = 3 * 2.0 * sigmoid(-2.5)
    assert loss == pytest.approx([-math.log(sigmoid(2.5))] * 3)
    assert gradient == pytest.approx([-slope, -slope, slope])
    metrics = DPO(beta=2.0)(inputs).metrics
    assert float(metrics["loss/dpo"].sum) == pytest.approx(-math.log(sigmoid(2.5)))
    assert metrics["loss/dpo"].count == 1.0
    assert float(metrics["reward/preference_accuracy"].sum) == 1.0
    assert float(metrics["reward/chosen"].sum) == pytest.approx(1.5)
    assert float(metrics["reward/rejected"].sum) == pytest.approx(-1.0)
    assert float(metrics["reward/margin"].sum) == pytest.approx(2.5)


def test_label_smoothing_by_hand() -> None:
    """Conservative DPO: (1 - e) of the pair as labelled, e of the pair swapped."""
    inputs = by_hand([[-1.0], [-1.0]], ref_logprobs=[[-1.5], [-0.5]])
    loss, _ = value_and_gradient(DPO(beta=1.0, label_smoothing=0.1), inputs)
    assert loss == pytest.approx([-0.9 * math.log(sigmoid(1.0)) - 0.1 * math.log(sigmoid(-1.0))] * 2)


@pytest.mark.parametrize("package", ["trl", "openrlhf"])
def test_against_peers(package: str) -> None:
    """Completions 0, 2, 4 are chosen; sequence_mean makes ours their mean over the three pairs."""
    assert_same_as(peer(package)["loss/dpo"], DPO(beta=0.1), recorded_inputs("sequence_mean", fields=("ref_logprobs",)))


def test_label_smoothing_against_openrlhf() -> None:
    inputs = recorded_inputs("sequence_mean", fields=("ref_logprobs",))
    assert_same_as(peer("openrlhf")["loss/dpo/label_smoothing"], DPO(beta=0.1, label_smoothing=0.1), inputs)


def test_refuses_what_is_not_pairs() -> None:
    with pytest.raises(ConfigError, match="keep_together=2"):
        DPO()(by_hand([[-1.0], [-1.0], [-1.0]], ref_logprobs=[[0.0], [0.0], [0.0]]))
    with pytest.raises(ConfigError, match="beta=0"):
        DPO(beta=0)
