"""What a user can get wrong, on the real command line: one message that names what to change, non-zero, no hang."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from tests.fakes import tiny_checkpoint
from tests.ranks import free_port, run_bounded

TIMEOUT_S = 180.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    return tiny_checkpoint(folder, family="llama")


def launch(tmp_path: Path, *overrides: str, nproc: int = 1, recipe: str = "grpo", shell: str = "") -> tuple[int, str]:
    """Runs ``launch/train.py`` under torchrun; its exit code and output."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={nproc}"]
    command += ["--master_addr=127.0.0.1", f"--master_port={free_port()}", "launch/train.py", f"+recipe={recipe}"]
    small = ["num_steps=1", "tracking.wandb=off", "tracking.tensorboard=false", f"run_dir={tmp_path / 'run'}"]
    if recipe == "grpo":
        small += ["engine.max_model_len=256", "engine.kv_cache_gib=0.06", "evaluation.num_problems=2"]
        small += ["rollout.prompts_per_step=2", "rollout.group_size=2"]
    given = {override.partition("=")[0] for override in overrides}
    command += [override for override in small if override.partition("=")[0] not in given]
    command += list(overrides)
    if shell:
        command = ["bash", "-c", f'{shell}; exec "$@"', "bash", *command]
    code = run_bounded(command, tmp_path / "output.txt", timeout_s=TIMEOUT_S)
    assert code is not None, "it hangs:\n" + (tmp_path / "output.txt").read_text()[-2000:]
    return code, (tmp_path / "output.txt").read_text()


def reward(name: str) -> tuple[str, str]:
    """Overrides that choose one of the rewards of bad_rewards.py."""
    module = "tests.recipes.bad_rewards"
    return f"environment.name={module}.problems", f"environment.reward={module}.{name}"


def errors(output: str) -> list[str]:
    """The lines that a rank ended with."""
    return [line for line in output.splitlines() if line.startswith("error: ")]


def test_a_missing_model(tmp_path: Path) -> None:
    code, output = launch(tmp_path, "model.name_or_path=/nowhere/at/all")
    assert code != 0
    assert any("model.name_or_path" in line for line in errors(output))


def test_a_damaged_checkpoint_is_found_before_anything_starts(tmp_path: Path, model: Path) -> None:
    broken = shutil.copytree(model, tmp_path / "broken")
    weights = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    code, output = launch(tmp_path, f"model.name_or_path={broken}")
    assert code != 0
    assert any("damaged" in line and "model.safetensors" in line for line in errors(output))
    assert not (tmp_path / "run").exists()


def test_a_tensor_parallel_size_that_does_not_divide_names_both_numbers(tmp_path: Path) -> None:
    odd = tiny_checkpoint(
        tmp_path,
        family="llama",
        num_heads=3,
        num_kv_heads=1,
        hidden_size=96,
    )
    code, output = launch(tmp_path, f"model.name_or_path={odd}", nproc=2)
    assert code != 0
    assert (
        sum("parallel.tensor_parallel_size=2 does not divide" in line and "3" in line for line in errors(output)) == 2
    )


def test_an_unknown_family(tmp_path: Path, model: Path) -> None:
    other = shutil.copytree(model, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))
    code, output = launch(tmp_path, f"model.name_or_path={other}")
    assert code != 0
    assert any("gpt2" in line and "llama" in line for line in errors(output))


def test_a_reward_that_raises_ends_every_rank_alike(tmp_path: Path, model: Path) -> None:
    code, output = launch(tmp_path, f"model.name_or_path={model}", *reward("raises"), nproc=2)
    assert code != 0
    assert sum("bad_rewards.raises" in line and "KeyError" in line for line in errors(output)) == 2


def test_a_reward_that_is_not_a_number(tmp_path: Path, model: Path) -> None:
    code, output = launch(tmp_path, f"model.name_or_path={model}", *reward("not_a_number"))
    assert code != 0
    assert any("not_a_number" in line and "nan" in line for line in errors(output))


def test_a_prompt_longer_than_the_context(tmp_path: Path, model: Path) -> None:
    code, output = launch(tmp_path, f"model.name_or_path={model}", "engine.max_model_len=32")
    assert code != 0
    assert any("engine.max_model_len" in line for line in errors(output))


def test_an_empty_data_set(tmp_path: Path, model: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    code, output = launch(
        tmp_path, f"model.name_or_path={model}", f"data.name_or_path={tmp_path / 'empty.jsonl'}", recipe="sft"
    )
    assert code != 0
    assert any("empty.jsonl" in line for line in errors(output))


def test_a_full_disk_at_export_leaves_nothing_half_written(tmp_path: Path, model: Path) -> None:
    rows = [{"prompt": f"say {n}", "completion": str(n)} for n in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = (f"data.name_or_path={tmp_path / 'rows.jsonl'}", "data.heldout_rows=4", "data.batch_size=4")
    code, output = launch(tmp_path, f"model.name_or_path={model}", *data, recipe="sft", shell="ulimit -f 60")
    assert code != 0
    assert any("could not write" in line and "adapter" in line and "free some" in line for line in errors(output))
    assert [path.name for path in (tmp_path / "run").iterdir() if "adapter" in path.name] == []
    assert not (tmp_path / "run" / "summary.json").exists()


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (
            "optimizer.learnig_rate=1e-3",
            "unknown key 'optimizer.learnig_rate' in 'optimizer.learnig_rate=1e-3'; "
            "did you mean 'optimizer.learning_rate'?",
        ),
        (
            "algorithm=gpso",
            "unknown algorithm in 'algorithm=gpso'; did you mean 'gspo'?; one of cispo, dapo, dr_grpo, grpo, gspo, "
            "ppo, reinforce_pp, reinforce_pp_baseline, rloo",
        ),
        (
            "environment=gsm8k1",
            "unknown environment in 'environment=gsm8k1'; did you mean 'gsm8k'?; one of arithmetic, calculator, code, "
            "dataset, gsm8k, judge, math, reasoning_gym, verifiers",
        ),
        (
            "algorithm.loss=gsppo",
            "algorithm.loss=gsppo is unknown; did you mean gspo? one of ppo_clip, gspo, gspo_token, cispo, "
            "importance_sampling, reinforce",
        ),
        ("numerics=exact", "numerics=exact with hardware.device=cpu, it needs kernels that both sides share, of an"),
        ("numerics=exactly", "numerics='exactly': must be one of ['fast', 'exact']"),
        ("environment.args.sise=3", "environment.args.sise: environment arithmetic has no such argument, did you mean"),
    ],
)
def test_what_is_misspelt_is_one_message_that_names_the_nearest(tmp_path: Path, argument: str, message: str) -> None:
    code, output = launch(tmp_path, "model.name_or_path=tiny-random/qwen3", argument)
    assert code != 0
    (error,) = errors(output)
    assert error.startswith(f"error: ConfigError: {message}")


def test_a_misspelt_recipe_names_the_nearest(tmp_path: Path) -> None:
    code, output = launch(tmp_path, recipe="grpoo")
    assert code != 0
    (error,) = errors(output)
    assert error.startswith("error: ConfigError: unknown recipe in '+recipe=grpoo'; did you mean 'grpo'?; one of ")


def test_a_section_the_recipe_does_not_use_is_refused(tmp_path: Path) -> None:
    code, output = launch(tmp_path, "engine.max_adapters=3", recipe="sft")
    assert code != 0
    assert any("does not use the section 'engine'" in line for line in errors(output))


def test_an_adapter_of_another_shape_names_the_keys(tmp_path: Path, model: Path) -> None:
    rows = [{"prompt": f"say {n}", "completion": str(n)} for n in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = (f"data.name_or_path={tmp_path / 'rows.jsonl'}", "data.heldout_rows=4", "data.batch_size=4")
    code, _ = launch(tmp_path, f"model.name_or_path={model}", *data, "lora.rank=4", recipe="sft")
    assert code == 0
    first = _losses(tmp_path)
    adapter = f"init_adapter={tmp_path / 'run' / 'adapter'}"
    code, output = launch(tmp_path, f"model.name_or_path={model}", *data, adapter, "lora.rank=8", recipe="sft")
    assert code != 0
    assert any("lora.rank=4 (here 8)" in line for line in errors(output))
    code, _ = launch(tmp_path, f"model.name_or_path={model}", *data, adapter, "lora.rank=4", recipe="sft")
    assert code == 0
    assert _losses(tmp_path)[0] == pytest.approx(first[-1], rel=2e-2)  # it starts where the first run, in bf16, ended


def _losses(tmp_path: Path) -> list[float]:
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    return [row["eval/loss"] for row in rows if "eval/loss" in row]


def test_the_resolved_configuration_is_printed(tmp_path: Path) -> None:
    code, output = launch(tmp_path, "lora.rank=12", "algorithm=gspo", "--cfg", "job")
    assert code == 0
    assert "rank: 12" in output
    assert "max_tokens_per_microbatch:" in output
    assert not (tmp_path / "run").exists()
