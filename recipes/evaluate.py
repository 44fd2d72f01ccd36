"""Evaluation: accuracy with its 95% interval and pass@k, per environment, the base model against an adapter.

One sample per problem is greedy; with more, each is drawn at ``sampling.temperature``. Both models play the same
problems with the same seeds in the same engine. Results are ``evaluation.json`` and ``evaluation.md`` in the run's
folder. Nothing is trained: the trainer only carries the adapter into the engine.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from framework import storage
from framework.config import RunConfig
from framework.environments.catalog import EnvironmentConfig, build_problems
from framework.evaluation import EvaluationResult, results_table, to_json
from framework.evaluation import evaluate as play
from framework.lora.peft_io import load_peft
from framework.runtime import POLICY, SamplingRuntime, versions
from framework.types import AdapterRef, RolloutGroup, SamplingParams


def prepare(cfg: RunConfig) -> RunConfig:
    """The configuration with the adapter's own rank and targets in the section ``lora``.

    Raises:
        AdapterError: ``evaluation.adapter`` is no adapter's folder.
    """
    if cfg.evaluation.adapter is None:
        return cfg
    spec, _ = load_peft(Path(cfg.evaluation.adapter).expanduser())
    return replace(cfg, lora=replace(spec, dropout=0.0))  # nothing is trained


def run(cfg: RunConfig, rt: SamplingRuntime) -> None:
    """Plays every environment with the base model and with the adapter; ``cfg`` comes from :func:`prepare`."""
    models: list[AdapterRef | None] = [None]
    if cfg.evaluation.adapter is not None:
        models.append(push_adapter(cfg, rt, Path(cfg.evaluation.adapter).expanduser()))
    environments = cfg.evaluation.environments or (cfg.environment,)
    results = [evaluate(cfg, rt, environment, ref) for environment in environments for ref in models]
    write(cfg, rt, results)


def push_adapter(cfg: RunConfig, rt: SamplingRuntime, folder: Path) -> AdapterRef:
    """The folder's adapter, in the engine."""
    with rt.mesh.agree_on_error("reading the adapter"):
        spec, tensors = load_peft(folder)
    rt.trainer.add_adapter(POLICY, spec, seed=cfg.seed)
    rt.trainer.import_adapter(POLICY, tensors)
    return rt.weight_sync.push(POLICY)


def evaluate(
    cfg: RunConfig, rt: SamplingRuntime, environment: EnvironmentConfig, ref: AdapterRef | None
) -> EvaluationResult:
    """One row of the table: one model on one environment's held-out problems."""
    mesh = rt.mesh
    problems = build_problems(environment, rt.chat, split="heldout", seed=cfg.seed)
    num_samples = cfg.evaluation.num_samples
    temperature = cfg.sampling.temperature if num_samples > 1 else 0.0
    result = play(
        rt.engine,
        ref,
        problems,
        range(min(cfg.evaluation.num_problems, len(problems)))[mesh.dp_rank :: mesh.dp_size],
        environment=label(environment),
        num_samples=num_samples,
        sampling=SamplingParams(max_tokens=cfg.sampling.max_tokens, temperature=temperature),
        seed=cfg.seed,
        coordinator=mesh,
        timeout_s=cfg.rollout.timeout_s,
        max_turns=cfg.rollout.max_turns,
        gather=partial(gather, rt),
    )
    return result if ref is None else replace(result, model="adapter")


def label(environment: EnvironmentConfig) -> str:
    """Its name in the table, with the arguments that tell it from others of the same name."""
    return " ".join([environment.name, *(f"{key}={value}" for key, value in environment.args.items())])


def gather(rt: SamplingRuntime, groups: Sequence[RolloutGroup]) -> Sequence[RolloutGroup]:
    """All replicas' groups, once each. All ranks must call it."""
    shares = rt.mesh.all_gather(tuple(groups) if rt.mesh.is_leader else ())
    return [group for share in shares for group in share]


def write(cfg: RunConfig, rt: SamplingRuntime, results: Sequence[EvaluationResult]) -> None:
    """Prints the table; writes it as Markdown and as JSON, and ``summary.json``."""
    table = results_table(results)
    with rt.mesh.agree_on_error("writing the results"):
        if rt.mesh.rank == 0:
            print(table, flush=True)
            storage.replace_file(rt.run_dir / "evaluation.md", table.encode() + b"\n")
            content = json.dumps(to_json(results), indent=2).encode() + b"\n"
            storage.replace_file(rt.run_dir / "evaluation.json", content)
    accuracy = {f"eval/{metric_part(r.environment)}/{r.model}/accuracy": r.accuracy for r in results}
    rt.tracker.log(0, accuracy)
    rt.tracker.finish(
        {
            **accuracy,
            "adapter": cfg.evaluation.adapter,
            "model": cfg.model.name_or_path,
            "model_source": rt.base.model.source,
            "versions": versions(),
        }
    )


def metric_part(label: str) -> str:
    """A label as metric names allow it."""
    return re.sub(r"[^a-z0-9_.\-]+", "-", label.lower()).strip("-")
