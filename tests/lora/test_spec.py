"""LoraSpec: scale, order of targets, refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest

from framework.errors import AdapterError
from framework.lora.spec import TARGETS, LoraSpec


def test_scale() -> None:
    assert LoraSpec(rank=16, alpha=32.0).scale == 2.0
    assert LoraSpec(rank=16, alpha=32.0, use_rslora=True).scale == 8.0
    assert LoraSpec(rank=5, alpha=11.0, use_rslora=True).scale == pytest.approx(11.0 / math.sqrt(5))


def test_targets_are_a_set_in_the_order_of_the_layout() -> None:
    assert LoraSpec(targets=("up_proj", "q_proj", "up_proj")).targets == ("q_proj", "up_proj")
    assert LoraSpec().targets == TARGETS
    assert LoraSpec(targets=("v_proj", "q_proj")) == LoraSpec(targets=("q_proj", "v_proj"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "lora.rank=0: must be at least 1"),
        ({"alpha": 0.0}, "lora.alpha=0.0: must be positive, or the adapter does nothing"),
        ({"alpha": float("nan")}, "lora.alpha=nan"),
        ({"dropout": 1.0}, r"lora.dropout=1.0: must be in \[0, 1\)"),
        ({"dropout": -0.1}, "lora.dropout=-0.1"),
        ({"targets": ()}, r"lora.targets=\[\]: must be a non-empty subset of \['q_proj'"),
        ({"targets": ("q_proj", "lm_head")}, r"lora.targets=\['q_proj', 'lm_head'\]"),
        ({"targets": "q_proj"}, "lora.targets="),
    ],
)
def test_refusals(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        LoraSpec(**changes)
