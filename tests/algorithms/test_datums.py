"""Rollouts to datums and back."""

from __future__ import annotations

import numpy as np
import pytest

from framework.algorithms.datums import rollouts_of, to_datum, trained_values, with_field
from framework.errors import ConfigError
from framework.types import AdapterRef, Rollout, RolloutGroup

REF = AdapterRef(name="policy", version=3, content_hash="00")
ROLLOUT = Rollout(
    token_ids=(5, 6, 7, 8),
    loss_mask=(False, True, False, True),
    sampling_logprobs=(0.0, -0.5, 0.0, -0.25),
    reward=1.0,
    adapter=REF,
    stop_reason="stop",
)


def test_to_datum_keeps_tokens_mask_logprobs_and_version() -> None:
    datum = to_datum(ROLLOUT)
    assert (datum.token_ids, datum.loss_mask, datum.adapter) == ((5, 6, 7, 8), (False, True, False, True), REF)
    assert datum.fields == {"sampling_logprobs": (0.0, -0.5, 0.0, -0.25)}


def test_with_field_spreads_over_trained_tokens_and_trained_values_gathers() -> None:
    (datum,) = with_field([to_datum(ROLLOUT)], "advantages", [np.array([2.0, -1.0], dtype=np.float32)])
    assert datum.fields["advantages"] == (0.0, 2.0, 0.0, -1.0)
    assert datum.fields["sampling_logprobs"] == (0.0, -0.5, 0.0, -0.25)
    assert trained_values(datum, "advantages").tolist() == [2.0, -1.0]


def test_with_field_refuses_another_length() -> None:
    with pytest.raises(ConfigError, match=r"ref_logprobs has shape \(3,\) for a datum of 2 trained tokens"):
        with_field([to_datum(ROLLOUT)], "ref_logprobs", [[0.0, 0.0, 0.0]])


def test_rollouts_of_keeps_the_order() -> None:
    groups = [RolloutGroup(rollouts=(ROLLOUT,) * n, problem_id=str(n)) for n in (2, 1)]
    assert rollouts_of(groups) == (ROLLOUT, ROLLOUT, ROLLOUT)
