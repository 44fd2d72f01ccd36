"""The TRL side of step.py: GRPOTrainer with PEFT and a colocated vLLM on the same prompts."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks.gpu.step import reward


class Clock(TrainerCallback):  # type: ignore[misc]
    """Seconds from the beginning of a step to its end, optimizer included, split by phase."""

    def __init__(self, plain_steps: int) -> None:
        self.steps: dict[str, list[dict[str, float]]] = {"without correction": [], "with correction": []}
        self.trainer: Any = None
        self._plain_steps = plain_steps
        self._start = 0.0
        self._seconds: dict[str, float] = {}

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """``call`` with its seconds added to a phase."""

        def run(*args: Any, **kwargs: Any) -> Any:
            torch.cuda.synchronize()
            start = time.perf_counter()
            result = call(*args, **kwargs)
            torch.cuda.synchronize()
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start
            return result

        return run

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.vllm_importance_sampling_correction = state.global_step >= self._plain_steps
        torch.cuda.synchronize()
        self._seconds = {"generate_s": 0.0, "sync_s": 0.0}
        self._start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        torch.cuda.synchronize()
        total = time.perf_counter() - self._start
        rest = total - sum(self._seconds.values())
        name = "without correction" if len(self.steps["without correction"]) < self._plain_steps else "with correction"
        self.steps[name].append({"step_s": total, **self._seconds, "train_s": rest})
        print(json.dumps(self.steps[name][-1]), flush=True)


def rewards(completions: Sequence[str], **row: Any) -> list[float]:
    """The same function as the other side's."""
    return [reward(text) for text in completions]


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    completions = job["prompts"] * job["group_size"]
    config = GRPOConfig(
        output_dir=job["scratch"] + "-trl",
        bf16=True,
        model_init_kwargs={"dtype": "bfloat16"},
        per_device_train_batch_size=job["microbatch"],
        gradient_accumulation_steps=completions // job["microbatch"],
        num_generations=job["group_size"],
        max_completion_length=job["max_tokens"],
        generation_kwargs={"ignore_eos": True},
        gradient_checkpointing=False,
        use_vllm=True,
        vllm_mode="colocate",
        vllm_gpu_memory_utilization=0.3,
        vllm_max_model_length=1024,
        vllm_importance_sampling_correction=True,
        beta=0.0,
        learning_rate=job["learning_rate"],
        max_steps=job["steps"] + job["corrected_steps"],
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        shuffle_dataset=False,
        seed=0,
    )
    clock = Clock(job["steps"])
    trainer = GRPOTrainer(
        model=job["model"],
        reward_funcs=rewards,
        args=config,
        train_dataset=Dataset.from_list([{"prompt": text} for text in job["texts"]]),
        peft_config=LoraConfig(r=job["rank"], lora_alpha=2 * job["rank"], target_modules="all-linear"),
        callbacks=[clock],
    )
    clock.trainer = trainer
    generation = trainer.vllm_generation
    generation.sync_weights = clock.timed("sync_s", generation.sync_weights)
    generation.generate = clock.timed("generate_s", generation.generate)
    torch.cuda.reset_peak_memory_stats()
    trainer.train()
    lengths = [row["completions/mean_length"] for row in trainer.state.log_history if "completions/mean_length" in row]
    names = ("trl", "vllm", "transformers", "peft", "torch", "accelerate")
    result = {
        "steps": clock.steps,
        "length": lengths,
        "peak_allocated_gib": torch.cuda.max_memory_allocated() / 2**30,
        "versions": {name: version(name) for name in names},
    }
    Path(sys.argv[2]).write_text(json.dumps(result))
    os._exit(0)  # vLLM's teardown takes long and says nothing


if __name__ == "__main__":
    main()
