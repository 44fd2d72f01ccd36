"""A run that was killed and continued is bitwise the run that was not: losses, rewards, tokens, adapter bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from framework.models.tiny import make_tiny_model
from tests.fakes import tiny_tokenizer
from tests.ranks import RanksFailed, run_ranks
from tests.recipes.resume_scenario import steps_of

TARGET = "tests.recipes.resume_scenario:run_once"
CASES = (("grpo", 1), ("grpo", 2), ("sft", 1), ("sft", 2))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    tiny_tokenizer().save_pretrained(folder / "tokenizer")
    rows = [
        {"messages": [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": str(n * n)}]}
        for n in range(40)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return make_tiny_model(folder / "model", family="qwen3", tokenizer_path=folder / "tokenizer")


@pytest.fixture(scope="module", params=CASES, ids=[f"{recipe}-tp{ranks}" for recipe, ranks in CASES])
def runs(request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Folders of the whole run, and of the run that was killed after step 3 (saved at 2) and continued."""
    recipe, ranks = request.param
    folder = tmp_path_factory.mktemp(f"{recipe}-{ranks}")
    options: dict[str, Any] = {
        "recipe": recipe,
        "model": model,
        "num_steps": 7,
        "lora__dropout": 0.1,
        "checkpoint__every": 2,
        "evaluation__every": 2,
        "data__name_or_path": str(model.parent / "rows.jsonl"),
        "data__batch_size": 8,
        "data__heldout_rows": 4,
        "resume": "auto",
    }
    run_ranks(TARGET, folder / "a", nproc=ranks, run_dir=folder / "whole", kill_after=None, **options)
    with pytest.raises(RanksFailed):
        run_ranks(TARGET, folder / "b", nproc=ranks, run_dir=folder / "killed", kill_after=3, **options)
    before = steps_of(folder / "killed")
    run_ranks(TARGET, folder / "c", nproc=ranks, run_dir=folder / "killed", kill_after=None, **options)
    return {"folder": folder, "before": before, "ranks": ranks, "options": options}


def test_the_killed_run_had_lost_a_step(runs: dict[str, Any]) -> None:
    assert sorted(runs["before"]) == [1, 2, 3]
    assert not (runs["folder"] / "b" / "rank0.pt").exists()


def test_every_step_after_the_checkpoint_is_bitwise_that_of_the_whole_run(runs: dict[str, Any]) -> None:
    whole, continued = steps_of(runs["folder"] / "whole"), steps_of(runs["folder"] / "killed")
    assert sorted(continued) == sorted(whole) == [1, 2, 3, 4, 5, 6, 7]
    for step in range(3, 8):
        assert continued[step] == whole[step], f"step {step}"


def test_the_adapters_are_the_same_bytes(runs: dict[str, Any]) -> None:
    whole, continued = (runs["folder"] / name / "adapter" / "adapter_model.safetensors" for name in ("whole", "killed"))
    assert whole.read_bytes() == continued.read_bytes()


def test_the_steps_are_not_those_of_a_cold_start(runs: dict[str, Any]) -> None:
    whole = steps_of(runs["folder"] / "whole")
    assert whole[3]["loss/total"] != whole[1]["loss/total"]
    assert whole[3]["optim/grad_norm"] != whole[1]["optim/grad_norm"]


def test_another_configuration_is_refused_with_the_keys(runs: dict[str, Any]) -> None:
    options = {**runs["options"], "optimizer__learning_rate": 0.5}
    (runs["folder"] / "killed" / "summary.json").unlink(missing_ok=True)
    outcome = run_ranks(
        TARGET, runs["folder"] / "d", nproc=runs["ranks"], run_dir=runs["folder"] / "killed", kill_after=None, **options
    )
    assert all("optimizer.learning_rate" in text and "0.5" in text for text in outcome)
