"""DPO, distillation, evaluation, and GRPO with dynamic sampling and KL terms, end to end on two replicas."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from framework.models.tiny import make_tiny_model
from tests.fakes import tiny_tokenizer
from tests.ranks import run_ranks
from tests.recipes.methods_scenario import steps_of


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """``folder`` with every run's records, and what rank 0 and rank 1 saw."""
    folder = tmp_path_factory.mktemp("methods")
    tiny_tokenizer().save_pretrained(folder / "tokenizer")
    model = make_tiny_model(folder / "model", family="qwen3", tokenizer_path=folder / "tokenizer")
    tokenizer = tiny_tokenizer()
    stranger = make_tiny_model(folder / "stranger", family="llama", tokenizer_path=folder / "tokenizer")
    vocabulary = json.loads((stranger / "tokenizer.json").read_text())
    words = vocabulary["model"]["vocab"]
    words["A"], words["B"] = words["B"], words["A"]
    (stranger / "tokenizer.json").write_text(json.dumps(vocabulary))
    assert "A" in tokenizer.get_vocab()
    pairs = [{"prompt": f"say {n}", "chosen": f"yes {n}", "rejected": "no"} for n in range(40)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    ranks = run_ranks(
        "tests.recipes.methods_scenario:on_ranks",
        folder / "out",
        nproc=2,
        timeout_s=240,
        model=model,
        stranger=stranger,
        runs=folder,
    )
    return {"folder": folder, "ranks": ranks}


def test_dynamic_sampling_refills_what_it_throws_away(runs: dict[str, Any]) -> None:
    for step in steps_of(runs["folder"] / "dapo"):
        assert step["rollout/filter_rounds"] >= 2
        assert step["rollout/filter_kept_fraction"] == pytest.approx(0.5, abs=0.2)
        assert step["rollout/uninformative_group_fraction"] == 0.0


def test_kl_in_the_loss_is_zero_before_the_first_step_and_grows(runs: dict[str, Any]) -> None:
    kl = [step["policy/ref_kl"] for step in steps_of(runs["folder"] / "dapo")]
    assert abs(kl[0]) < 1e-8
    assert kl[-1] > 1e-6


def test_kl_in_the_reward_reaches_the_advantages_of_flat_groups(runs: dict[str, Any]) -> None:
    steps = steps_of(runs["folder"] / "kl_in_reward")
    assert all("policy/ref_kl" not in step for step in steps)
    assert all(step["optim/grad_norm"] > 0 for step in steps)
    assert all(step["time/reference_s"] > 0 for step in steps)


def test_with_a_lag_every_step_makes_two_versions_and_the_ratio_moves(runs: dict[str, Any]) -> None:
    steps = steps_of(runs["folder"] / "lag")
    for rank in runs["ranks"]:
        start, end = rank["lag"]
        assert end - start == 1 + 2 * len(steps)  # one push before the first step, one per optimizer step
    on_policy = steps_of(runs["folder"] / "dapo")
    assert all(abs(step["loss/ratio"] - 1.0) < 1e-4 for step in on_policy)
    assert all(step["parity/logprob_abs_diff_max"] < 1e-3 for step in (*steps, *on_policy))  # of the part without lag
    assert all(abs(step["loss/ratio"] - 1.0) > 1e-3 for step in steps)
    assert all(step["time/reference_s"] > 0.0 for step in steps)  # the logprobs before the first update


def test_dpo_starts_at_log_two_and_learns_to_prefer(runs: dict[str, Any]) -> None:
    steps = steps_of(runs["folder"] / "dpo")
    assert steps[0]["loss/dpo"] == pytest.approx(math.log(2), abs=1e-6)
    assert steps[0]["loss/total"] == pytest.approx(math.log(2), abs=1e-6)
    assert steps[-1]["loss/dpo"] < 0.65
    summary = json.loads((runs["folder"] / "dpo" / "summary.json").read_text())
    rows = [json.loads(line) for line in (runs["folder"] / "dpo" / "metrics.jsonl").read_text().splitlines()]
    held_out = [row["eval/loss"] for row in rows if "eval/loss" in row]
    assert held_out[0] == pytest.approx(math.log(2), abs=1e-6)
    assert held_out[-1] < 0.65
    assert summary["eval/preference_accuracy_end"] == 1.0
    assert (runs["folder"] / "dpo" / "adapter" / "adapter_config.json").is_file()


def test_the_student_comes_nearer_to_an_adapter(runs: dict[str, Any]) -> None:
    kl = [step["policy/reverse_kl"] for step in steps_of(runs["folder"] / "adapter_teacher")]
    assert kl[0] > 0.05
    assert kl[-1] < 0.7 * kl[0]


def test_a_teacher_that_is_the_base_model_has_nothing_to_teach(runs: dict[str, Any]) -> None:
    (step,) = steps_of(runs["folder"] / "model_teacher")
    assert abs(step["policy/reverse_kl"]) < 1e-5


def test_a_step_without_a_token_to_train_on_is_refused(runs: dict[str, Any]) -> None:
    for rank in runs["ranks"]:
        assert rank["all_cut"].startswith("ConfigError: step 1: every rollout was cut")
        assert "sampling.max_tokens" in rank["all_cut"]


def test_teachers_that_cannot_be_are_refused(runs: dict[str, Any]) -> None:
    for rank in runs["ranks"]:
        assert "tokenizer differs" in rank["stranger"]
        assert "distill.teacher is not set" in rank["no_teacher"]


def test_evaluation_compares_base_and_adapter_in_every_environment(runs: dict[str, Any]) -> None:
    folder: Path = runs["folder"] / "evaluation"
    rows = json.loads((folder / "evaluation.json").read_text())
    name = "tests.recipes.methods_scenario.mixed"
    assert [(row["environment"], row["model"]) for row in rows] == [
        (name, "base"),
        (name, "adapter"),
        (f"{name} variant=b", "base"),
        (f"{name} variant=b", "adapter"),
    ]
    for row in rows:
        assert (row["num_problems"], row["num_samples"]) == (3, 4)
        assert set(row["pass_at_k"]) == {"1", "2", "4"}
        assert row["accuracy_low"] <= row["accuracy"] <= row["accuracy_high"]
    assert rows[0]["reward_mean"] != rows[1]["reward_mean"]
    assert {**rows[0], "environment": ""} == {**rows[2], "environment": ""}  # the same seeds, the same samples
    table = (folder / "evaluation.md").read_text().splitlines()
    assert len(table) == 6
    assert "pass@4" in table[0]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary[f"eval/{name}-variant-b/adapter/accuracy"] == rows[3]["accuracy"]
    assert [rank["rank"] for rank in runs["ranks"]] == [(8, 4), (8, 4)]


def test_one_sample_is_greedy_and_its_interval_is_wilsons(runs: dict[str, Any]) -> None:
    (row,) = json.loads((runs["folder"] / "greedy" / "evaluation.json").read_text())
    assert (row["model"], row["num_problems"], row["num_samples"]) == ("base", 4, 1)
    assert row["accuracy"] >= 0.5  # problems 0 and 2 are always solved
    if row["accuracy"] == 0.5:  # Wilson, 2 of 4, by hand: (0.5 + z2/8) / (1 + z2/4) with z2 = 3.8415, and so on
        assert row["accuracy_low"] == pytest.approx(0.1500, abs=1e-4)
        assert row["accuracy_high"] == pytest.approx(0.8500, abs=1e-4)
