"""``lora=none`` with an engine: one copy of the weights, which the optimizer writes and the engine samples with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.fakes import tiny_checkpoint
from tests.ranks import run_ranks
from tests.recipes.resume_scenario import steps_of

TOLERANCE = {"vllm": 0.01, "trainer": 1e-5}
"""Between the engine's logprobs and the trainer's: bf16 with the engine's kernels, fp32 with the trainer's."""


@pytest.fixture(scope="module", params=[pytest.param("vllm", marks=pytest.mark.gpu), "trainer"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One launch; ``folder`` is where its runs are."""
    folder: Path = tmp_path_factory.mktemp("full")
    rows = [
        {"messages": [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": str(n * n)}]}
        for n in range(40)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = tiny_checkpoint(
        folder,
        family="qwen3",
        hidden_size=256,
        head_dim=64,
        ffn_size=512,
        dtype=torch.bfloat16 if request.param == "vllm" else torch.float32,
    )
    (seen,) = run_ranks(
        "tests.recipes.full_scenario:run_all",
        folder / "out",
        nproc=1,
        timeout_s=240,
        model=model,
        rows=folder / "rows.jsonl",
        run_dir=folder / "runs",
        place=request.param,
    )
    return {**seen, "folder": folder, "tolerance": TOLERANCE[request.param], "bf16": request.param == "vllm"}


def distance(first: Any, second: Any) -> float:
    return float(np.abs(first - second).mean())


def test_after_the_steps_the_engine_has_the_trainers_new_logprobs_and_not_the_old(run: dict[str, Any]) -> None:
    start, trained = run["start"], run["trained"]
    assert distance(start["engine"], start["trainer"]) <= run["tolerance"]
    assert distance(trained["engine"], trained["trainer"]) <= run["tolerance"]
    assert distance(trained["engine"], start["engine"]) > 0.1
    assert distance(trained["trainer"], start["trainer"]) > 0.1


def test_what_is_added_to_the_weights_is_masters_and_moments(run: dict[str, Any]) -> None:
    """Three fp32 numbers per parameter; the gradient is freed by the step, the weights are the engine's."""
    assert run["bytes per parameter"] == 12.0


def test_every_step_is_a_version_and_samples_agree(run: dict[str, Any]) -> None:
    steps = steps_of(run["folder"] / "runs" / "grpo")
    assert sorted(steps) == [1, 2, 3]
    for step in (1, 2, 3):
        assert steps[step]["parity/logprob_abs_diff_mean"] <= 2 * run["tolerance"]
        assert steps[step]["optim/grad_norm"] > 0
    text = (run["folder"] / "runs" / "grpo" / "metrics.jsonl").read_text()
    versions = [row["sync/version"] for row in map(json.loads, text.splitlines()) if "sync/version" in row]
    assert versions == sorted(set(versions))  # never one twice, the resumed step's included
    assert versions[:2] == [2.0, 3.0]


def test_a_step_without_a_push_is_noticed_and_an_old_version_refused(run: dict[str, Any]) -> None:
    assert "the weights have changed since they were pushed" in run["step without push"]
    assert "is not loaded" in run["old version"]


def test_a_resumed_run_makes_the_same_step_again(run: dict[str, Any]) -> None:
    assert run["resumed"]["from step"] == 2
    assert distance(run["resumed"]["trainer"], run["trained"]["trainer"]) <= 2 * run["tolerance"]
    assert distance(run["resumed"]["engine"], run["resumed"]["trainer"]) <= run["tolerance"]


def test_the_exported_model_is_the_trained_one(run: dict[str, Any]) -> None:
    summary = json.loads((run["folder"] / "runs" / "grpo" / "summary.json").read_text())
    start = load_file(run["folder"] / "model" / "model.safetensors")
    trained = load_file(Path(summary["trained_model"]) / "model.safetensors")
    assert all(not torch.equal(trained[name], start[name]) for name in trained if name in start)
    dtype = torch.bfloat16 if run["bf16"] else torch.float32
    assert all(tensor.dtype is dtype for tensor in trained.values())


def test_sft_lowers_the_held_out_loss(run: dict[str, Any]) -> None:
    summary = json.loads((run["folder"] / "runs" / "sft" / "summary.json").read_text())
    assert summary["eval/loss_end"] < summary["eval/loss_start"] - 0.1
