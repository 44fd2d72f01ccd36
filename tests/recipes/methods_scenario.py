"""What test_distill_dpo_evaluate.py runs on ranks: every recipe but plain GRPO, one engine for all, two replicas.

The first problem of each two always earns the same reward, so that dynamic sampling has something to throw away.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from framework.config import RunConfig
from framework.data.chat import Chat
from framework.environments.base import StepResult
from framework.errors import FrameworkError
from framework.lora.peft_io import save_peft
from framework.runtime import POLICY, SamplingRuntime, open_records, open_sampling
from framework.types import Completion, Prompt
from recipes import distill, dpo, evaluate, grpo
from tests.recipes.scenario import PROMPTS, EvenTokens, config


class Flat:
    """An environment whose reward says nothing."""

    def __init__(self, prompt: tuple[int, ...]) -> None:
        self._prompt = prompt

    def observe(self) -> Prompt:
        return Prompt(token_ids=self._prompt)

    def step(self, completion: Completion) -> StepResult:
        return StepResult(reward=1.0, done=True)


class MixedProblems:
    """Problems 0 and 2 are always solved; of 1 and 3 the reward is the fraction of even tokens."""

    def __init__(self, split: str) -> None:
        self._split = split

    def __len__(self) -> int:
        return len(PROMPTS)

    def problem_id(self, index: int) -> str:
        return f"{self._split}/{index}"

    def make(self, index: int) -> EvenTokens | Flat:
        return EvenTokens(PROMPTS[index]) if index % 2 else Flat(PROMPTS[index])


def mixed(chat: Chat, *, split: str, seed: int, variant: str = "a") -> MixedProblems:
    """``environment.name=tests.recipes.methods_scenario.mixed``."""
    return MixedProblems(split)


def on_ranks(model: Path, stranger: Path, runs: Path) -> dict[str, Any]:
    """Runs the recipes one after the other; what each left behind is in ``runs/<name>``.

    Args:
        stranger: a model with another tokenizer.
    """
    name = "tests.recipes.methods_scenario.mixed"
    common = {"parallel__tensor_parallel_size": 1, "environment__name": name, "num_steps": 3, "lora__dropout": 0.0}
    base = config(model, runs / "first", **common)
    first = open_sampling(base)
    seen: dict[str, Any] = {}
    algorithm = {"name": "dapo", "aggregation": "token_mean", "dynamic_sampling": True, "kl_coef": 0.1}
    _run(first, grpo.run, config(model, runs / "dapo", **common, algorithm=algorithm))
    in_reward = {"name": "kl_in_reward", "kl_coef": 0.1, "kl_in": "reward"}
    _run(first, grpo.run, config(model, runs / "kl_in_reward", **common, algorithm=in_reward))
    seen["lag"] = lag(first, model, runs, common)
    pairs = {"name_or_path": str(runs / "pairs.jsonl"), "batch_size": 8, "heldout_rows": 4}
    _run(first, dpo.run, config(model, runs / "dpo", **{**common, "num_steps": 8}, data=pairs))
    teacher = _teacher(first, base, runs / "teacher")
    for run_name, path, steps in (("adapter_teacher", teacher, 12), ("model_teacher", model, 1)):
        options = {**common, "num_steps": steps, "rollout__group_size": 8, "distill__teacher": str(path)}
        _run(first, distill.run, config(model, runs / run_name, **options))
    cut = config(model, runs / "cut", **common, algorithm={"name": "filter", "overlong_filter": True})
    seen["all_cut"] = _refusal(lambda: _run(first, grpo.run, cut))
    first.trainer.remove_adapter(POLICY)
    other = config(model, runs / "no", **common, distill__teacher=str(stranger))
    seen["stranger"] = _refusal(lambda: distill.teacher_of(other, first))
    seen["no_teacher"] = _refusal(lambda: distill.teacher_of(base, first))
    two = [{"name": name}, {"name": name, "args": {"variant": "b"}}]
    options = {"num_samples": 4, "num_problems": 3, "adapter": str(teacher), "environments": two}
    evaluated = config(model, runs / "evaluation", **common, evaluation=options)
    seen["rank"] = base.lora.rank, evaluate.prepare(evaluated).lora.rank
    _run(first, evaluate.run, evaluate.prepare(evaluated))
    greedy = {"num_problems": 4}
    _run(first, evaluate.run, config(model, runs / "greedy", **common, evaluation=greedy))
    return seen


def lag(rt: SamplingRuntime, model: Path, runs: Path, common: dict[str, Any]) -> list[int]:
    """Trains on samples one version old; returns the versions at the start and at the end.

    The first problem of a step's two is in the first part, the second in the second.
    """
    lagged = {**common, "environment__name": "tests.recipes.scenario.even_problems", "rollout__max_lag": 1}
    start = rt.weight_sync.versions.last
    _run(rt, grpo.run, config(model, runs / "lag", **lagged, optimizer__learning_rate=2e-2))
    return [start, rt.weight_sync.versions.last]


def _run(rt: SamplingRuntime, recipe: Any, cfg: RunConfig) -> None:
    """One recipe with records of its own; its adapters are removed afterwards."""
    recipe(cfg, replace(rt, **open_records(cfg, rt.base)))
    for name in rt.trainer.adapters():
        rt.trainer.remove_adapter(name)


def _refusal(call: Callable[[], object]) -> str:
    try:
        call()
    except FrameworkError as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"


def _teacher(rt: SamplingRuntime, cfg: RunConfig, folder: Path) -> Path:
    """An adapter with random factors, of half the student's rank, as a PEFT folder."""
    spec = replace(cfg.lora, rank=cfg.lora.rank // 2)
    rt.trainer.add_adapter(POLICY, spec, seed=1)
    rng = np.random.default_rng(0)
    tensors = {
        key: rng.normal(size=value.shape, scale=0.1).astype(np.float32)
        for key, value in rt.trainer.export_adapter(POLICY).items()
    }
    rt.trainer.remove_adapter(POLICY)
    if rt.mesh.rank == 0:
        save_peft(folder, spec=spec, tensors=tensors, base_model="tiny", dtype=rt.base.dtype)
    rt.mesh.barrier()
    return folder


def steps_of(run_dir: Path) -> list[dict[str, Any]]:
    """The metrics of every training step."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss/total" in row]
