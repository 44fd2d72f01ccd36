"""The TRL side of grpo_step.py: GRPOTrainer with PEFT on the same prompts. Runs in the environment of env_trl.sh.

It imports nothing of this project. The job and the results are JSON files.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer


class TimedTrainer(GRPOTrainer):  # type: ignore[misc]
    """Adds up the seconds of generation and of forward plus backward."""

    seconds: dict[str, float]

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = super()._generate(*args, **kwargs)
        self.seconds["generate_s"] = self.seconds.get("generate_s", 0.0) + time.perf_counter() - start
        return result

    def _compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = super()._compute_loss(*args, **kwargs)
        self.seconds["forward_s"] = self.seconds.get("forward_s", 0.0) + time.perf_counter() - start
        return result


class StepClock(TrainerCallback):  # type: ignore[misc]
    """Seconds from the beginning of a step to its end, optimizer included."""

    def __init__(self) -> None:
        self.trainer: TimedTrainer | None = None
        self.steps: list[dict[str, float]] = []
        self._start = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        assert self.trainer is not None
        self.trainer.seconds = {}
        self._start = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        assert self.trainer is not None
        total = time.perf_counter() - self._start
        generate = self.trainer.seconds.get("generate_s", 0.0)
        step = {"step_s": total, "generate_s": generate, "train_s": total - generate}
        self.steps.append(step)
        print(json.dumps(step), file=sys.stderr, flush=True)


def digits(completions: Sequence[str], **row: Any) -> list[float]:
    """A reward that differs within a group: the share of digits."""
    return [sum(c.isdigit() for c in text) / max(1, len(text)) for text in completions]


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(job["threads"])
    config = GRPOConfig(
        output_dir=job["scratch"],
        use_cpu=True,
        bf16=False,
        model_init_kwargs={"dtype": "bfloat16"},
        per_device_train_batch_size=job["microbatch"],
        gradient_accumulation_steps=job["completions"] // job["microbatch"],
        num_generations=job["completions"] // len(job["prompts"]),
        max_completion_length=job["max_tokens"],
        generation_kwargs={"min_new_tokens": job["max_tokens"]},
        gradient_checkpointing=False,
        beta=0.0,
        learning_rate=1e-5,
        max_steps=job["steps"],
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        shuffle_dataset=False,
        seed=0,
    )
    clock = StepClock()
    trainer = TimedTrainer(
        model=job["model"],
        reward_funcs=digits,
        args=config,
        train_dataset=Dataset.from_list([{"prompt": text} for text in job["prompts"]]),
        peft_config=LoraConfig(r=job["rank"], lora_alpha=2 * job["rank"], target_modules="all-linear"),
        callbacks=[clock],
    )
    trainer.seconds = {}
    clock.trainer = trainer
    trainer.train()
    lengths = [row["completions/mean_length"] for row in trainer.state.log_history if "completions/mean_length" in row]
    versions = {name: version(name) for name in ("trl", "transformers", "peft", "torch")}
    result = {"steps": clock.steps, "mean_length": lengths, "versions": versions}
    Path(sys.argv[2]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
