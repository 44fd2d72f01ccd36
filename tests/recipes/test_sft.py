"""SFT's losses are those of transformers and PEFT on the same data, seed and hyper-parameters, with both backends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.fakes import tiny_checkpoint
from tests.ranks import run_ranks
from tests.recipes.sft_scenario import peft_losses, sft_config


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    folder = tmp_path_factory.mktemp("sft")
    model = tiny_checkpoint(folder, family="qwen2")
    rows: Path = folder / "rows.jsonl"
    conversations = [
        [("user", f"say {n} " + "please " * (n % 7)), ("assistant", f"{n * n} " * (1 + n % 4))] for n in range(60)
    ]
    rows.write_text(
        "".join(
            json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]}) + "\n"
            for turns in conversations
        )
    )
    (seen,) = run_ranks(
        "tests.recipes.sft_scenario:on_one_rank", folder / "out", nproc=1, model=model, rows=rows, run_dir=folder
    )
    return {**seen, "peft": peft_losses(sft_config(model, rows, folder))}


@pytest.mark.parametrize("backend", ["megatron", "hf"])
def test_the_first_ten_losses_equal_pefts(losses: dict[str, list[float]], backend: str) -> None:
    assert len(losses["peft"]) == 10
    assert losses[backend] == pytest.approx(losses["peft"], rel=1e-4)


def test_the_losses_are_of_a_model_that_learns(losses: dict[str, list[float]]) -> None:
    assert losses["peft"][-1] < losses["peft"][0] - 0.05
