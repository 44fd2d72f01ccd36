"""How many tokens/s through this engine, beside vLLM on its own, for the same requests with the same adapter?

64 requests of 48 tokens (8 prompts of different length, 8 times each), SmolLM2, LoRA r=16 on all linears, bf16, seeded,
with the logprobs of the sampled tokens. Two others to compare with: vLLM as its users start it, which loads the adapter
from a PEFT folder and computes LoRA with its own CPU code (in a process of its own), and vLLM's own calls on the engine
that this project has set up, which shows what our layer above vLLM costs. Sides take turns; the first round is dropped.

    .venv/bin/python -m benchmarks.sampling
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks import report
from benchmarks.grpo_step import prompts
from framework.lora.peft_io import save_peft
from framework.lora.spec import LoraSpec
from framework.models.hub import DEFAULT_MODEL, default_cache_dir, resolve_model
from framework.models.layout import projections
from framework.models.spec import read_spec


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--turns", type=int, default=2, help="how often each process runs")
    parser.add_argument("--rounds", type=int, default=4, help="rounds of each process, the first of which is dropped")
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
        "rounds": arguments.rounds,
        "threads": arguments.threads,
    }
    with tempfile.TemporaryDirectory() as folder:
        job["adapter"] = str(write_adapter(Path(folder) / "adapter", model.path, rank=16))
        speeds, versions = run(job, arguments.turns)
    sides = {name: report.spread(values) for name, values in speeds.items()}
    print(report.table([{"side": name, **figures} for name, figures in sides.items()]))
    ratios = {
        "of_stock_vllm": sides["tandem"]["median"] / sides["stock vLLM"]["median"],
        "of_its_calls": sides["tandem"]["median"] / sides["vLLM's calls, our engine"]["median"],
        "of_base_model": sides["tandem"]["median"] / sides["tandem, base model"]["median"],
    }
    print({name: round(value, 3) for name, value in ratios.items()}, "(wanted: at least 0.95 of vLLM)")
    shown: dict[str, Any] = {k: v for k, v in job.items() if k not in ("model", "prompts")}
    report.write(
        "sampling", {"ratios": ratios, "tokens_per_s": sides, "job": shown}, machine=machine, versions=versions
    )


def run(job: dict[str, Any], turns: int) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Tokens/s of every side and round, without first rounds; and the versions."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.sampling_sides"]
    speeds: dict[str, list[float]] = {}
    versions: dict[str, str] = {}
    for turn in range(turns):
        for side in ("tandem", "vllm"):
            print(f"turn {turn + 1} of {turns}: {side}", flush=True)
            result = report.in_process(command, {**job, "side": side})
            versions = result["versions"]
            for name, values in result["tokens_per_s"].items():
                speeds.setdefault(name, []).extend(values[1:])
    return speeds, versions


def write_adapter(folder: Path, model: Path, *, rank: int) -> Path:
    """A random adapter on all linears that changes what is sampled."""
    generator = torch.Generator().manual_seed(0)
    spec = LoraSpec(rank=rank, alpha=2.0 * rank)
    tensors = {}
    for p in projections(read_spec(model), spec.targets):
        tensors[f"{p.path}.lora_A.weight"] = torch.randn(rank, p.in_features, generator=generator).div(50).numpy()
        tensors[f"{p.path}.lora_B.weight"] = torch.randn(p.out_features, rank, generator=generator).div(50).numpy()
    save_peft(folder, spec=spec, tensors=tensors, base_model=str(model), dtype=torch.bfloat16)
    return folder


if __name__ == "__main__":
    main()
