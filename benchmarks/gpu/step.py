"""One GRPO step beside TRL's colocated mode, on the same machine in the same run, one process after the other.

16 prompts x 8 completions x 512 tokens, Qwen3-0.6B shapes with random weights, LoRA r=32 on all linears, bf16, no KL
term. This side is recipes/grpo.py itself with its defaults but for the microbatch (``JOB``). TRL's is GRPOTrainer with
``vllm_mode="colocate"``, without gradient checkpointing, and without vLLM's importance-sampling correction (it is TRL's
default and costs one more forward, which this side does not make); a few steps at the end are made with it.

    python -m benchmarks.gpu.step --out out/ [--trl folder-with-trl]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import report, shapes

SCRATCH = Path("/dev/shm/tandem-bench")
JOB = {
    "prompts": 16,
    "group_size": 8,
    "prompt_tokens": 64,
    "max_tokens": 512,
    "rank": 32,
    "learning_rate": 1e-5,
    "microbatch": 16,
    "microbatch_tokens": 25088,
}


def texts() -> list[str]:
    """The prompts, made of random words."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 150000, (JOB["prompts"], JOB["prompt_tokens"]), generator=generator).tolist()
    return [" ".join(f"t{token}" for token in row) for row in tokens]


def reward(completion: str) -> float:
    """The share of words with an even number: something that differs within a group."""
    words = completion.split()
    return sum(word[-1] in "02468" for word in words) / max(1, len(words))


def in_process(module: str, job: dict[str, Any], out: Path, extra_path: Path | None) -> Any:
    """Runs one side and returns its result; None if it failed, with its log in ``out``."""
    job_file, result_file, log_file = (out / f"{module.rpartition('.')[2]}.{kind}" for kind in ("job", "result", "log"))
    job_file.write_text(json.dumps(job))
    result_file.unlink(missing_ok=True)
    paths = [str(extra_path)] if extra_path else []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.environ.get("PYTHONPATH", ""), *paths])}
    command = [sys.executable, "-W", "ignore", "-m", module, str(job_file), str(result_file)]
    with log_file.open("w") as log, contextlib.suppress(subprocess.TimeoutExpired):
        limit_s: float = job["limit_s"]
        subprocess.run(command, env=environment, stdout=log, stderr=subprocess.STDOUT, timeout=limit_s, check=False)
    return json.loads(result_file.read_text()) if result_file.exists() else None


def phases(steps: list[dict[str, float]]) -> dict[str, float]:
    """The median of each phase, without the first two steps."""
    steady = steps[2:]
    return {name: statistics.median([step[name] for step in steady]) for name in steady[0]}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="qwen3-0.6b")
    parser.add_argument("--trl", type=Path, help="folder with TRL and what it needs, if it is not installed")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--corrected-steps", type=int, default=4, help="of TRL, at the end, with its correction")
    parser.add_argument("--limit-s", type=float, default=300.0, help="of one side")
    parser.add_argument("--sides", nargs="+", default=["tandem", "trl"])
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    folder = SCRATCH / args.model
    if not (folder / "tokenizer.json").exists():
        shapes.write_checkpoint(args.model, folder, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    job = {**JOB, "model": str(folder), "steps": args.steps, "texts": texts(), "limit_s": args.limit_s}
    job["corrected_steps"] = args.corrected_steps
    job["scratch"] = str(SCRATCH / "step")
    figures: dict[str, Any] = {"job": dict(JOB)}
    for side in args.sides:
        result = in_process(f"benchmarks.gpu.step_{side}", job, args.out, args.trl if side == "trl" else None)
        if result is None:
            print(f"{side} gave no result; see its log", flush=True)
            continue
        steady = {name: steps for name, steps in result["steps"].items() if len(steps) > 2}
        figures[side] = {**result, "phases": {name: phases(steps) for name, steps in steady.items()}}
        print(json.dumps({side: figures[side]["phases"]}, indent=1), flush=True)
    if {"tandem", "trl"} <= set(figures):
        ours = figures["tandem"]["phases"]["as it is"]
        figures["ratio"] = {
            name: theirs["step_s"] / ours["step_s"] for name, theirs in figures["trl"]["phases"].items()
        }
        figures["push, wake and sleep of the step"] = (
            sum(ours[f"{name}_s"] for name in ("push", "wake", "sleep")) / (ours["step_s"])
        )
        print(json.dumps({key: figures[key] for key in ("ratio", "push, wake and sleep of the step")}), flush=True)
    report.write(args.out / "step.json", figures)


if __name__ == "__main__":
    main()
