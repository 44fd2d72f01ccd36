"""This project's side of grpo_step.py: the six calls of recipes/grpo.py, with completions of a forced length."""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from framework.algorithms.catalog import AlgorithmConfig, build_algorithm
from framework.algorithms.datums import with_field
from framework.batching import make_batch
from framework.config import ModelConfig, RunConfig, SamplingConfig, TrackingConfig
from framework.environments.base import StepResult
from framework.lora.spec import LoraSpec
from framework.parity import check_parity, measure_parity
from framework.rollout import collect
from framework.runtime import POLICY, SamplingRuntime, open_sampling, versions
from framework.timing import PhaseTimer
from framework.types import AdamParams, Completion, Prompt, SamplingParams


class Episode:
    """One prompt; the reward is the share of digits in the completion, which differs within a group."""

    def __init__(self, rt: SamplingRuntime, text: str) -> None:
        self._rt = rt
        self._text = text

    def observe(self) -> Prompt:
        return Prompt(token_ids=self._rt.chat.tokens(self._text))

    def step(self, completion: Completion) -> StepResult:
        text = self._rt.chat.text(completion)
        return StepResult(reward=sum(c.isdigit() for c in text) / max(1, len(text)), done=True)


class Texts:
    """Rendered prompts as problems."""

    def __init__(self, rt: SamplingRuntime, texts: Sequence[str]) -> None:
        self._rt = rt
        self._texts = texts

    def __len__(self) -> int:
        return len(self._texts)

    def problem_id(self, index: int) -> str:
        return f"text/{index}"

    def make(self, index: int) -> Episode:
        return Episode(self._rt, self._texts[index])


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    cfg = RunConfig(
        run_dir=job["scratch"],
        model=ModelConfig(name_or_path=job["model"]),
        lora=LoraSpec(rank=job["rank"], alpha=2.0 * job["rank"]),
        sampling=SamplingConfig(max_tokens=job["max_tokens"]),
        tracking=TrackingConfig(wandb="off", tensorboard=False),
    )
    rt = open_sampling(cfg)
    steps, lengths = measure(cfg, rt, job)
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    result = {"steps": steps, "mean_length": lengths, "versions": versions(), "peak_rss_gib": peak_gib}
    Path(sys.argv[2]).write_text(json.dumps(result))


def measure(cfg: RunConfig, rt: SamplingRuntime, job: dict[str, Any]) -> tuple[list[dict[str, float]], list[float]]:
    """Seconds of every step by phase, and its mean completion length."""
    algorithm = build_algorithm(AlgorithmConfig(), max_tokens=cfg.sampling.max_tokens)
    problems = Texts(rt, job["prompts"])
    sampling = SamplingParams(max_tokens=job["max_tokens"], ignore_eos=True)
    rt.trainer.add_adapter(POLICY, cfg.lora, seed=cfg.seed)
    ref = rt.weight_sync.push(POLICY)
    steps: list[dict[str, float]] = []
    lengths: list[float] = []
    for step in range(1, job["steps"] + 1):
        timer = PhaseTimer(rt.base.device.synchronize)
        with timer.phase("generate"):
            result = collect(
                rt.engine,
                ref,
                problems,
                range(len(problems)),
                group_size=job["completions"] // len(problems),
                sampling=sampling,
                seed=cfg.seed,
                step=step,
                coordinator=rt.mesh,
            )
        with timer.phase("train"):
            datums = algorithm.datums(result.groups)
            advantages = algorithm.advantages(result.groups, datums, global_sum=lambda value: value)
            datums = with_field(datums, "advantages", advantages.values)
            batch = make_batch(
                datums,
                aggregation=algorithm.aggregation,
                max_tokens=cfg.trainer.max_tokens_per_microbatch,
                version=ref,
            )
            loss = rt.trainer.forward_backward(POLICY, batch, algorithm.loss)
            check_parity(measure_parity(datums, loss.result, rt.mesh), cfg.parity, step=step)
            rt.trainer.optim_step(POLICY, AdamParams(learning_rate=1e-5, max_grad_norm=1.0))
        with timer.phase("push"):
            ref = rt.weight_sync.push(POLICY)
        steps.append(
            {"step_s": timer.total(), **{k.removeprefix("time/"): seconds for k, seconds in timer.seconds.items()}}
        )
        lengths.append(sum(sum(d.loss_mask) for d in datums) / len(datums))
        print(json.dumps(steps[-1]), file=sys.stderr, flush=True)
    return steps, lengths


if __name__ == "__main__":
    main()
