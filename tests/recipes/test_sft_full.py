"""``lora=none``: SFT of every weight equals transformers' on the same data, is resumed bitwise, and exports a model.

What samples is refused on a CPU, with the reason; with an engine it is tested on a GPU, in test_grpo_full.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from framework.config import to_typed
from framework.errors import ConfigError
from framework.models.tiny import make_tiny_model
from tests.fakes import tiny_tokenizer
from tests.ranks import RanksFailed, run_ranks
from tests.recipes.resume_scenario import steps_of
from tests.recipes.sft_scenario import full_losses, sft_config

pytestmark = pytest.mark.slow
TARGET = "tests.recipes.resume_scenario:run_once"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("full")
    tiny_tokenizer().save_pretrained(folder / "tokenizer")
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"say {n}"},
                {"role": "assistant", "content": f"{n * n} " * (n % 3 + 1)},
            ]
        }
        for n in range(40)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return make_tiny_model(folder / "model", family="qwen3", tokenizer_path=folder / "tokenizer")


def options(model: Path) -> dict[str, Any]:
    cfg = sft_config(model, model.parent / "rows.jsonl", Path("unused"))
    return {
        "recipe": "sft",
        "model": model,
        "num_steps": 5,
        "seed": cfg.seed,
        "lora": None,
        "optimizer": {"learning_rate": 1e-3, "weight_decay": 0.01, "max_grad_norm": 0.5},
        "trainer__max_tokens_per_microbatch": 256,
        "data": {"name_or_path": str(model.parent / "rows.jsonl"), "batch_size": 8, "heldout_rows": 4},
        "checkpoint__every": 2,
        "resume": "auto",
    }


@pytest.fixture(scope="module")
def runs(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole run, and of one that was killed after step 3 (saved at 2) and continued."""
    folder = tmp_path_factory.mktemp("runs")
    run_ranks(TARGET, folder / "a", nproc=1, run_dir=folder / "whole", kill_after=None, **options(model))
    with pytest.raises(RanksFailed):
        run_ranks(TARGET, folder / "b", nproc=1, run_dir=folder / "killed", kill_after=3, **options(model))
    run_ranks(TARGET, folder / "c", nproc=1, run_dir=folder / "killed", kill_after=None, **options(model))
    return folder


def test_the_first_five_losses_are_those_of_transformers(runs: Path, model: Path) -> None:
    steps = steps_of(runs / "whole")
    want = full_losses(sft_config(model, model.parent / "rows.jsonl", runs / "unused"), num_steps=5)
    assert [steps[step]["loss/total"] for step in range(1, 6)] == pytest.approx(want, abs=1e-4)
    assert want[-1] < want[0] - 0.05


def test_a_killed_run_goes_on_bitwise(runs: Path) -> None:
    whole, continued = steps_of(runs / "whole"), steps_of(runs / "killed")
    for step in range(3, 6):
        assert continued[step] == whole[step], f"step {step}"
    files = [(runs / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "killed")]
    assert files[0] == files[1]


def test_the_exported_model_loads_and_has_the_held_out_loss_of_the_run(runs: Path, model: Path) -> None:
    summary = json.loads((runs / "whole" / "summary.json").read_text())
    assert summary["trained_model"] == str(runs / "whole" / "model")
    assert "adapter" not in summary
    assert summary["eval/loss_end"] < summary["eval/loss_start"]
    trained = AutoModelForCausalLM.from_pretrained(runs / "whole" / "model", dtype=torch.float32)
    start = load_file(model / "model.safetensors")
    moved = {name: (value - start[name]).abs().max() for name, value in trained.named_parameters() if name in start}
    assert len(moved) > 10
    assert all(distance > 1e-4 for distance in moved.values())


def test_recipes_that_sample_are_refused_on_a_cpu_with_the_reason(model: Path, tmp_path: Path) -> None:
    with pytest.raises(
        RanksFailed, match=r"ConfigError: lora=none with recipe=grpo.*repacks.*backend=trainer.*recipe=sft"
    ):
        run_ranks(
            TARGET,
            tmp_path / "out",
            nproc=1,
            run_dir=tmp_path / "run",
            kill_after=None,
            recipe="grpo",
            model=model,
            lora=None,
        )


def test_an_adapter_to_start_from_is_refused() -> None:
    with pytest.raises(ConfigError, match="init_adapter=x: lora=none trains the base model itself"):
        to_typed({"lora": None, "init_adapter": "x"})
