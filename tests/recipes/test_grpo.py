"""GRPO end to end on real Megatron and real vLLM: one and two ranks, Qwen3 and Llama, fp32."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.fakes import tiny_checkpoint
from tests.ranks import run_bounded, run_ranks
from tests.recipes.stock_vllm import TOKENS

CASES = (("qwen3", 2), ("llama", 2), ("qwen2", 1))


@pytest.fixture(scope="module", params=CASES, ids=[f"{family}-tp{ranks}" for family, ranks in CASES])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One launch per case; ``ranks`` is what each rank returned."""
    family, ranks = request.param
    folder = tmp_path_factory.mktemp(f"{family}-{ranks}")
    model = tiny_checkpoint(folder, family=family, num_layers=2)
    seen = run_ranks(
        "tests.recipes.scenario:on_ranks",
        folder / "out",
        nproc=ranks,
        timeout_s=240,
        model=model,
        run_dir=folder / "run",
    )
    return {"model": model, "run_dir": folder / "run", "ranks": seen}


def test_the_engine_samples_from_what_the_trainer_pushed(run: dict[str, Any]) -> None:
    for rank in run["ranks"]:
        for push in rank["pushes"][:3]:
            assert push["diff"] <= 1e-4
            assert push["diff_to_base"] > 0.01
            assert push["previous_gone"]


def test_every_push_is_a_new_version_with_other_tokens(run: dict[str, Any]) -> None:
    pushes = run["ranks"][0]["pushes"][:3]
    assert [push["ref"] for push in pushes] == [("probe", 2), ("probe", 3), ("probe", 4)]  # 1 was the start-up probe
    assert len({str(push["tokens"]) for push in pushes}) == 3
    assert len({push["hash"] for push in pushes}) == 3


def test_the_prefix_cache_never_answers_for_other_weights(run: dict[str, Any]) -> None:
    first, other, again = run["ranks"][0]["pushes"][3]["prefix_cache"]
    assert first == again
    assert first != other


def test_what_the_engine_refuses_says_which_key_to_change(run: dict[str, Any]) -> None:
    refused = run["ranks"][0]["refusals"]
    assert refused["empty"] is not None
    assert "no tokens" in refused["empty"]
    assert "engine.max_model_len" in refused["long"]
    assert "vocabulary" in refused["vocabulary"]
    assert "not loaded" in refused["unknown_version"]
    assert "engine.max_adapters" in refused["full"]
    assert "twice" in refused["twice"]
    assert "z_proj" in refused["module"]


def test_faults_between_trainer_and_engine_end_with_their_name(run: dict[str, Any]) -> None:
    for rank in run["ranks"]:
        seen = rank["injections"]
        assert [seen[name] for name in ("probe", "as_pushed", "gate_as_pushed")] == [None] * 3
        assert "DeliveryError" in seen["engine_without_adapters"]
        assert "the engine ignores the adapter" in seen["engine_without_adapters"]
        assert seen["bit_flipped"].endswith("differs from the trainer's shard in model.layers.1.mlp.down_proj")
        assert "DeliveryError" in seen["slot_of_another"]
        assert "model.layers.0.self_attn.q_proj and all other modules" in seen["slot_of_another"]
        assert "DeliveryError" in seen["push_skipped"]
        assert "model.layers.0.self_attn.q_proj" in seen["push_skipped"]
        for name in ("gate_raw_logprobs", "gate_stale_adapter"):
            assert seen[name].startswith("MismatchError: step 7: parity/"), name


def test_all_ranks_hold_the_same_replicated_factors_and_sample_the_same(run: dict[str, Any]) -> None:
    first = run["ranks"][0]
    assert first["step"] == 5
    for rank in run["ranks"][1:]:
        assert rank["completions"] == first["completions"]
        for path, factor in first["replicated"].items():
            assert torch.equal(rank["replicated"][path], factor), path


def test_training_moved_the_reward_and_the_summary_has_what_is_promised(run: dict[str, Any]) -> None:
    rows = [json.loads(line) for line in (run["run_dir"] / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "reward/mean" in row]
    assert len(steps) == 5
    assert all(row["optim/grad_norm"] > 0 for row in steps)
    assert all(row["parity/logprob_abs_diff_mean"] <= 1e-4 for row in steps)
    summary = json.loads((run["run_dir"] / "summary.json").read_text())
    for key in (
        "eval/accuracy_start",
        "eval/accuracy_end",
        "num_steps",
        "time/step_s",
        "time/push_s",
        "time/generate_s",
    ):
        assert np.isfinite(summary[key]), key
    assert summary["time/train_s"] > 0
    assert summary["parity/logprob_abs_diff_mean"] <= 1e-4
    assert summary["model"] == str(run["model"])
    assert "megatron-core" in summary["versions"]


def test_the_exported_adapter_gives_peft_the_trainers_logits(run: dict[str, Any]) -> None:
    base = AutoModelForCausalLM.from_pretrained(run["model"], dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, run["run_dir"] / "adapter")
    with torch.no_grad():
        logits = model(torch.arange(3, 27)[None]).logits[0]
        with model.disable_adapter():
            without = model(torch.arange(3, 27)[None]).logits[0]
    assert (logits - without).abs().max() > 1e-3
    for rank in run["ranks"]:
        assert (rank["logits"] - logits).abs().max() <= 1e-4


def test_the_exported_adapter_gives_stock_vllm_the_trainers_logprobs(run: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "logprobs.json"
    command = [sys.executable, "-m", "tests.recipes.stock_vllm", str(run["model"]), str(run["run_dir"] / "adapter")]
    code = run_bounded([*command, str(out)], tmp_path / "log.txt", timeout_s=180)
    assert code == 0, (tmp_path / "log.txt").read_text()[-3000:]
    seen = {key: torch.tensor(values) for key, values in json.loads(out.read_text()).items()}
    wanted = run["ranks"][0]["logits"].log_softmax(dim=-1)[:-1].gather(1, torch.tensor(TOKENS[1:])[:, None])[:, 0]
    assert (seen["adapter"] - wanted).abs().max() <= 1e-4
    assert (seen["base"] - wanted).abs().max() > 1e-3
