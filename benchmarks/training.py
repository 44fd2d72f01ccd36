"""How many tokens/s does the Megatron trainer train with, and how many transformers with PEFT, on the same batch?

One optimizer step of LoRA r=16 on all linears in bf16: 64 sequences of 40 prompt and 48 trained tokens. The other side
gets its best: sequences of equal length, so that no padding is computed; logits for trained positions only
(``logits_to_keep``); no cache; the microbatch it is fastest with. Both sides take turns in separate processes; each
process's first step is dropped.

    .venv/bin/python -m benchmarks.training
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from benchmarks import report
from framework.models.hub import DEFAULT_MODEL, default_cache_dir, resolve_model


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--rounds", type=int, default=2, help="how often each side runs")
    parser.add_argument("--steps", type=int, default=4, help="steps of each run, the first of which is dropped")
    parser.add_argument("--microbatches", type=int, nargs="+", default=[8, 16, 32], help="sequences, for transformers")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    machine = report.machine()
    model = resolve_model(arguments.model, cache_dir=default_cache_dir())
    job = {
        "model": str(model.path),
        "sequences": 64,
        "prompt_tokens": 40,
        "trained_tokens": 48,
        "rank": 16,
        "steps": arguments.steps,
        "threads": arguments.threads,
    }
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.training_sides"]
    runs: dict[str, list[dict[str, Any]]] = {}
    for turn in range(arguments.rounds):
        for side, microbatch in [("megatron", 0), *(("transformers", count) for count in arguments.microbatches)]:
            name = f"{side}/{microbatch}" if microbatch else side
            print(f"round {turn + 1} of {arguments.rounds}: {name}", flush=True)
            result = report.in_process(command, {**job, "side": side, "microbatch": microbatch})
            runs.setdefault(name, []).append(result)
    sides = {name: steady(results) for name, results in runs.items()}
    print(report.table([{"side": name, **figures} for name, figures in sides.items()]))
    best = max((name for name in sides if name != "megatron"), key=lambda name: sides[name]["tokens_per_s"])
    ratio = sides["megatron"]["tokens_per_s"] / sides[best]["tokens_per_s"]
    print(f"megatron / {best}, tokens per second: {ratio:.2f} (wanted: at least 1)")
    figures = {"ratio": ratio, "against": best, "sides": sides, "job": {k: v for k, v in job.items() if k != "model"}}
    report.write("training", figures, machine=machine, versions=runs["megatron"][0]["versions"])


def steady(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Tokens per second of the median step, without each run's first."""
    steps = [seconds for result in results for seconds in result["seconds"][1:]]
    tokens = results[0]["tokens"]
    return {
        "tokens_per_s": tokens / report.median(steps),
        "slowest": tokens / max(steps),
        "fastest": tokens / min(steps),
        "loss": results[0]["losses"][0],
        "peak_rss_gib": max(result["peak_rss_gib"] for result in results),
        "steps": len(steps),
    }


if __name__ == "__main__":
    main()
