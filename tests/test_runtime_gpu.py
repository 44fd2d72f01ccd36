"""The pair on an accelerator: one copy of the weights, a computed cache, sleeps that leave nothing behind."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.fakes import tiny_checkpoint
from tests.ranks import run_ranks

pytestmark = pytest.mark.gpu

MIB = 2**20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("qwen3")
    return tiny_checkpoint(folder, family="qwen3", num_layers=2, head_dim=64)


@pytest.fixture(scope="module")
def seen(model: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("pair")
    (rank,) = run_ranks(
        "tests.runtime_gpu_scenario:on_rank", folder, nproc=1, timeout_s=300, model=model, run_dir=folder / "run"
    )
    return dict(rank)


def test_the_accelerator_is_found_and_the_weights_are_there_once(seen: dict[str, Any]) -> None:
    assert seen["device"] != "cpu"
    assert seen["shared"] > 10
    assert seen["outside"] == []


def test_a_sleep_gives_the_cache_back_and_the_same_tokens_come_after_it(seen: dict[str, Any]) -> None:
    awake, asleep = seen["memory"][-1]
    assert awake - asleep > 4 * MIB, "33 sequences of 256 tokens: 33 * 256 * 1024 bytes"
    assert seen["same tokens"]


def test_200_sleeps_with_training_between_leave_less_than_64_mib(seen: dict[str, Any]) -> None:
    assert len(seen["memory"]) == 200
    for side in (0, 1):
        assert seen["memory"][-1][side] - seen["memory"][3][side] < 64 * MIB


def test_the_recipe_sleeps_in_every_step(seen: dict[str, Any]) -> None:
    assert seen["sleeps"]
    assert len(seen["steps"]) == 5
    for row in seen["steps"]:
        assert 0.0 < row["time/sleep_s"] < 0.5
        assert 0.0 < row["time/wake_s"] < 0.5


def agreement(folder: Path, *, family: str, head_dim: int, ffn_size: int, **how: Any) -> dict[str, Any]:
    """The scenario of that name on a tiny model in bfloat16."""
    shape = {"num_layers": 4, "hidden_size": 256, "head_dim": head_dim, "ffn_size": ffn_size}
    model = tiny_checkpoint(folder, family=family, dtype=torch.bfloat16, **shape)
    scenario, run_dir = "tests.runtime_gpu_scenario:agreement", folder / "run"
    (rank,) = run_ranks(scenario, folder / "out", nproc=1, timeout_s=300, model=model, run_dir=run_dir, **how)
    return dict(rank)


@pytest.mark.parametrize("graphs", [False, True])
def test_the_trainer_has_the_bits_of_the_engine_that_reads_the_same_tokens(graphs: bool, tmp_path: Path) -> None:
    rank = agreement(tmp_path, family="llama", head_dim=64, ffn_size=512, graphs=graphs)
    assert np.abs(rank["trainer"] - rank["read"]).max() < 1e-5
    assert np.abs(rank["base"] - rank["read"]).mean() > 0.1, "the adapter does something"


@pytest.mark.parametrize(("family", "head_dim", "temperature"), [("llama", 64, 1.0), ("qwen3", 128, 0.7)])
def test_exact_the_sampled_logprobs_are_the_trainers_bit_for_bit(
    family: str, head_dim: int, temperature: float, tmp_path: Path
) -> None:
    how = {"graphs": True, "numerics": "exact", "temperature": temperature}
    rank = agreement(tmp_path, family=family, head_dim=head_dim, ffn_size=1024, **how)
    assert len(rank["sampled"]) == 8 * 150
    sampled = rank["sampled"].astype(np.float32)
    assert {name: int((rank[name] != sampled).sum()) for name in ("trainer", "alone")} == {"trainer": 0, "alone": 0}
    assert np.abs(rank["base"] - rank["trainer"]).mean() > 0.1, "the adapter does something"


def test_too_little_memory_is_refused_with_a_reserve_that_would_do(model: Any, tmp_path_factory: Any) -> None:
    folder = tmp_path_factory.mktemp("refused")
    (rank,) = run_ranks(
        "tests.runtime_gpu_scenario:refusal", folder, nproc=1, timeout_s=300, model=model, run_dir=folder / "run"
    )
    assert rank["message"] is not None
    advised = re.search(r"engine\.memory_reserve_gib=([\d.]+)", rank["message"])
    assert advised is not None, rank["message"]
    assert float(advised.group(1)) > 1.0
