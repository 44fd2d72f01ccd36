"""The Megatron trainer against transformers + PEFT, in fp32, at every layout; and its promises about state."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tiny_models import VARIANTS
from tests.trainer.megatron.conftest import GRADIENT_KEYS, Reference
from tests.trainer.megatron.scenario import combine
from tests.trainer.reference import relative_difference

LAYOUTS = ("tp1", "tp2", "tp2_sp")
Layouts = dict[str, list[dict[str, Any]]]


def _tp_size(layout: str) -> int:
    return 1 if layout == "tp1" else 2


def _gradient(ranks: list[dict[str, Any]], tp_size: int) -> dict[str, Tensor]:
    return combine([rank["gradient"] for rank in ranks], tp_size=tp_size)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_equal_transformers(layout: str, variant: str, by_layout: Layouts, expected: Reference) -> None:
    for rank in by_layout[layout]:
        difference = (rank["logits"][variant] - expected.logits[variant]).abs().max().item()
        assert difference <= 1e-4
        assert difference <= 1e-5, "the tiny models agree to 1e-6; more means that something changed"


@pytest.mark.parametrize("key", GRADIENT_KEYS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_adapter_equals_peft(layout: str, key: Any, by_layout: Layouts, expected: Reference) -> None:
    ranks = [rank["gradients"][key] for rank in by_layout[layout]]
    outcome = expected.gradients[key]
    for rank, result in zip(by_layout[layout], ranks, strict=True):
        assert (rank["adapter_logits"][key] - expected.adapter_logits[key]).abs().max() <= 1e-4
        assert result["loss"] == pytest.approx(outcome.loss, rel=1e-5)
        for got, want in zip(result["logprobs"], outcome.logprobs, strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
        for got, want in zip(result["entropy"], outcome.entropy, strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    gradient = _gradient(ranks, _tp_size(layout))
    assert relative_difference(gradient, outcome.gradient) <= 1e-5
    for name, want in outcome.gradient.items():
        assert relative_difference({name: gradient[name]}, {name: want}) <= 5e-5
    assert all(any(f".{target}." in name for target in key[1]) for name in gradient)
