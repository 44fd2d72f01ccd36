"""A's first values: PEFT's distribution, one stream per projection and seed."""

from __future__ import annotations

import pytest
import torch

from framework.lora.init import init_a

PATH = "model.layers.0.self_attn.q_proj"


def test_the_distribution_is_pefts() -> None:
    """kaiming_uniform_(a=sqrt(5)) on [r, in] is U(-1/sqrt(in), 1/sqrt(in))."""
    a = init_a(PATH, rank=64, in_features=400, seed=0)
    assert a.dtype == torch.float32
    assert a.abs().max().item() <= 0.05
    assert a.abs().max().item() > 0.0499
    assert a.mean().item() == pytest.approx(0.0, abs=5e-4)
    assert a.std().item() == pytest.approx(0.05 / 3**0.5, rel=0.01)


def test_values_depend_on_the_path_and_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = init_a(PATH, rank=4, in_features=8, seed=3)
    torch.manual_seed(2)
    assert torch.equal(first, init_a(PATH, rank=4, in_features=8, seed=3))
    others = [init_a(PATH, rank=4, in_features=8, seed=4), init_a(PATH + "x", rank=4, in_features=8, seed=3)]
    assert all(not torch.equal(first, other) for other in others)
