"""How long does a GRPO step take, and where does it go? This project and TRL's GRPOTrainer with PEFT, in turns.

A step is 64 completions of exactly 48 tokens from 8 prompts, one AdamW update of LoRA r=16 on all linears, bf16, and
the new adapter ready to sample from. Both sides sample with their own engine (TRL: transformers' generate, because its
colocated vLLM does not start on a CPU). They run one after the other, several times; each process's first step is
dropped.

    bash benchmarks/env_trl.sh && .venv/bin/python -m benchmarks.grpo_step
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from benchmarks import report
from framework.data.chat import Chat
from framework.models.hub import DEFAULT_MODEL, default_cache_dir, resolve_model

QUESTIONS = (
    "What is 17 + 25?",
    "Name three rivers in Europe.",
    "Write a haiku about the sea.",
    "How many legs do 4 spiders have?",
    "Count from 5 to 15.",
    "What is the capital of Peru and when was it founded?",
    "List five prime numbers.",
    "Explain why the sky is blue.",
)
TRL_MICROBATCH = 16
"""The fastest of 8, 16, 32 and 64 where this was written; see ``--microbatch``."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--rounds", type=int, default=2, help="how often each side runs")
    parser.add_argument("--steps", type=int, default=4, help="steps of each run, the first of which is dropped")
    parser.add_argument("--trl", default="build/trl/bin/python", help="the interpreter of env_trl.sh")
    parser.add_argument("--microbatch", type=int, default=TRL_MICROBATCH, help="TRL's per_device_train_batch_size")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    machine = report.machine()
    model = resolve_model(arguments.model, cache_dir=default_cache_dir())
    job = {
        "model": str(model.path),
        "prompts": prompts(str(model.path)),
        "completions": 64,
        "max_tokens": 48,
        "rank": 16,
        "steps": arguments.steps,
        "threads": arguments.threads,
        "microbatch": arguments.microbatch,
    }
    commands = {
        "tandem": [sys.executable, "-W", "ignore", "-m", "benchmarks.grpo_step_tandem"],
        "trl": [arguments.trl, "-W", "ignore", "benchmarks/grpo_step_trl.py"],
    }
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in commands}
    for turn in range(arguments.rounds):
        for side, command in commands.items():
            print(f"round {turn + 1} of {arguments.rounds}: {side}", flush=True)
            runs[side].append(report.in_process(command, job))
    sides = {side: steady(results) for side, results in runs.items()}
    print(report.table([row(side, figures) for side, figures in sides.items()]))
    ratio = sides["trl"]["step_s"]["median"] / sides["tandem"]["step_s"]["median"]
    print(f"TRL / tandem, seconds per step: {ratio:.2f} (wanted: at least 3)")
    report.write(
        "grpo_step",
        {"ratio": ratio, "sides": sides, "job": {k: v for k, v in job.items() if k not in ("model", "prompts")}},
        machine=machine,
        versions=runs["trl"][0]["versions"] | runs["tandem"][0]["versions"],
    )


def prompts(folder: str) -> list[str]:
    """The questions as the model's chat template renders them; both sides tokenise these texts."""
    from transformers import AutoTokenizer

    chat = Chat(AutoTokenizer.from_pretrained(folder))
    return [chat.render([{"role": "user", "content": q}], add_generation_prompt=True) for q in QUESTIONS]


def steady(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Seconds by phase over all runs, without each run's first step."""
    lengths = {length for result in results for length in result["mean_length"]}
    assert lengths == {48.0}, f"completions of {lengths} tokens instead of 48"
    steps = [step for result in results for step in result["steps"][1:]]
    first = [result["steps"][0]["step_s"] for result in results]
    return {name: report.spread([step[name] for step in steps]) for name in steps[0]} | {
        "first_step_s": report.spread(first),
        "num_steps": len(steps),
    }


def row(side: str, figures: dict[str, Any]) -> dict[str, Any]:
    """One line of the table; TRL has no push, its engine is the trained model."""
    phases = ("generate_s", "train_s", "push_s")
    step = figures["step_s"]
    return {
        "side": side,
        "step_s": step["median"],
        "min": step["min"],
        "max": step["max"],
        **{name: figures[name]["median"] if name in figures else 0.0 for name in phases},
        "first_step_s": figures["first_step_s"]["median"],
        "steps": figures["num_steps"],
    }


if __name__ == "__main__":
    main()
