"""What two ranks cost and give: tensor parallel and data parallel beside one rank, on CPUs or GPUs.

The same GRPO steps by recipes/grpo.py, first in one process, then in two with tensor parallelism, then in two with
twice the prompts and data parallelism; each start in turn under torchrun. Of each: the step by phase, tokens per second
of all ranks, the push, the collectives it makes, the lockstep guard, and whether replicated factors are equal bit for
bit.

    python -m benchmarks.gpu.ranks --out out/ [--model folder-or-name] [--steps 50]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.gpu import report
from benchmarks.gpu.step import texts

SIDES = {"one rank": (1, 1), "tensor parallel 2": (2, 2), "data parallel 2": (2, 1)}
"""Ranks, and ranks per copy of the model."""
MULTICAST_OFF = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}


def run_side(side: str, job: dict[str, Any], out: Path) -> dict[str, Any]:
    """Starts the ranks and gives what rank 0 wrote."""
    ranks, tp = SIDES[side]
    job_file, result_file = out / "ranks.job", out / "ranks.result"
    result_file.unlink(missing_ok=True)
    replicas = ranks // tp
    job = {
        **job,
        "tensor_parallel": tp,
        "prompts": job["prompts"] * replicas,
        "texts": texts()[: job["prompts"]] * replicas,
    }
    job_file.write_text(json.dumps(job))
    threads = str(max(1, (os.cpu_count() or 1) // ranks))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command += ["-m", "benchmarks.gpu.ranks_side", str(job_file), str(result_file)]
    subprocess.run(command, env={**os.environ, **MULTICAST_OFF, "OMP_NUM_THREADS": threads}, check=True)
    job_file.unlink()
    result: dict[str, Any] = json.loads(result_file.read_text())
    result_file.unlink()
    return result


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="tiny-random/qwen3")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--pushes", type=int, default=100)
    parser.add_argument("--name", default="ranks")
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=list(SIDES))
    args = parser.parse_args()
    if args.prompts > len(texts()):
        parser.error(f"--prompts {args.prompts}: there are {len(texts())}")
    args.out.mkdir(parents=True, exist_ok=True)
    job = {key: value for key, value in vars(args).items() if key not in ("out", "sides", "name")}
    job["scratch"] = str(args.out.resolve() / "runs")
    figures: dict[str, Any] = {"job": {k: v for k, v in job.items() if k != "scratch"}}
    for side in args.sides:
        figures[side] = run_side(side, job, args.out)
        print(json.dumps({side: figures[side]}, indent=1), flush=True)
    one = figures.get("one rank")
    for side in args.sides:
        if one:
            ratio = figures[side]["tokens_per_s"] / one["tokens_per_s"]
            figures[side]["tokens/s against one rank"] = ratio
            print(f"{side}: {ratio:.2f} x the tokens/s of one rank", flush=True)
    report.write(args.out / f"{args.name}.json", figures)


if __name__ == "__main__":
    main()
