"""What is refused before anything starts, by name."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from framework.config import to_typed
from framework.device import open_device
from framework.errors import ConfigError
from framework.pair import check_exact

HEADS_OF_64 = SimpleNamespace(head_dim=64)
HOPPER = replace(open_device("cpu", local_rank=0), kind="gpu", has_invariant_attention=True)


def refusal(values: dict[str, Any] | None = None, **base: Any) -> str | None:
    found = {"device": HOPPER, "mesh": SimpleNamespace(tp_size=1), "dtype": torch.bfloat16, "spec": HEADS_OF_64, **base}
    try:
        check_exact(to_typed({"numerics": "exact", **(values or {})}), SimpleNamespace(**found))  # type: ignore[arg-type]
    except ConfigError as error:
        return str(error)
    return None


def test_exact_is_taken_where_both_sides_have_the_same_kernels() -> None:
    assert refusal() is None
    assert refusal({"lora": None}) is None


@pytest.mark.parametrize(
    ("values", "base", "key"),
    [
        ({}, {"device": open_device("cpu", local_rank=0)}, "hardware.device=cpu"),
        ({}, {"mesh": SimpleNamespace(tp_size=2)}, "parallel.tensor_parallel_size=2"),
        ({"model": {"dtype": "float32"}}, {"dtype": torch.float32}, "model.dtype=float32"),
        ({}, {"spec": SimpleNamespace(head_dim=80)}, "heads of 80"),
        ({"trainer": {"backend": "hf"}}, {}, "trainer.backend=hf"),
        ({"lora": {"dropout": 0.1}}, {}, "lora.dropout=0.1"),
        ({"engine": {"backend": "trainer"}}, {}, "engine.backend=trainer"),
    ],
)
def test_exact_is_refused_elsewhere_with_the_key(values: dict[str, Any], base: dict[str, Any], key: str) -> None:
    message = refusal(values, **base)
    assert message is not None
    assert message.startswith(f"numerics=exact with {key}, ")
    assert message.endswith("use numerics=fast")
