"""This project's side of step.py: recipes/grpo.py as it is, on the job's prompts."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.step import reward
from framework.config import RunConfig, to_typed
from framework.data.chat import Chat
from framework.device import open_device
from framework.environments.base import StepResult
from framework.runtime import open_sampling, versions
from framework.types import Completion, Prompt
from recipes import grpo


class Episode:
    """One prompt, one completion."""

    def __init__(self, chat: Chat, text: str) -> None:
        self._chat = chat
        self._text = text

    def observe(self) -> Prompt:
        return Prompt(token_ids=self._chat.tokens(self._text))

    def step(self, completion: Completion) -> StepResult:
        return StepResult(reward=reward(self._chat.text(completion)), done=True)


class Texts:
    """The job's prompts as problems."""

    def __init__(self, chat: Chat, texts: Sequence[str]) -> None:
        self._chat = chat
        self._texts = texts

    def __len__(self) -> int:
        return len(self._texts)

    def problem_id(self, index: int) -> str:
        return f"text/{index}"

    def make(self, index: int) -> Episode:
        return Episode(self._chat, self._texts[index])


def texts(chat: Chat, *, split: str, seed: int) -> Texts:
    """``environment.name=benchmarks.gpu.step_tandem.texts``."""
    return Texts(chat, json.loads(Path(sys.argv[1]).read_text())["texts"])


def config(job: dict[str, Any]) -> RunConfig:
    """The recipe's defaults but for the job."""
    return to_typed(
        {
            "recipe": "grpo",
            "num_steps": job["steps"],
            "run_dir": job["scratch"],
            "model": {"name_or_path": job["model"]},
            "trainer": {"max_tokens_per_microbatch": job["microbatch_tokens"]},
            "engine": {"max_model_len": 1024, "max_num_seqs": job["prompts"] * job["group_size"]},
            "lora": {"rank": job["rank"], "alpha": 2.0 * job["rank"]},
            "optimizer": {"learning_rate": job["learning_rate"]},
            "environment": {"name": "benchmarks.gpu.step_tandem.texts"},
            "sampling": {"max_tokens": job["max_tokens"]},
            "rollout": {"prompts_per_step": job["prompts"], "group_size": job["group_size"]},
            "parity": {"probe": False},  # made for trained models: a random one hardly notices an adapter in bf16
            "evaluation": {"every": 0, "num_problems": 1},
            "tracking": {"wandb": "off", "tensorboard": False},
        }
    )


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    cfg = config(job)
    rt = open_sampling(cfg)
    device = open_device("auto", local_rank=0)
    device.reset_peak_memory()
    grpo.run(cfg, rt)
    rows = [json.loads(line) for line in (rt.run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [
        {key.removeprefix("time/"): row[key] for key in row if key.startswith("time/") and key != "time/tokens_per_s"}
        for row in rows
        if "time/step_s" in row
    ]
    lengths = [row["rollout/completion_tokens"] for row in rows if "rollout/completion_tokens" in row]
    result = {
        "steps": {"as it is": steps},
        "length": lengths,
        "sleeps": rt.sleeps,
        "peak_allocated_gib": device.peak_memory_allocated() / 2**30,
        "versions": versions(),
    }
    Path(sys.argv[2]).write_text(json.dumps(result))
    os._exit(0)  # vLLM's teardown takes long and says nothing


if __name__ == "__main__":
    main()
