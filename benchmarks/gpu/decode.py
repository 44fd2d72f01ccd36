"""Where does a decode step's time go? Kernels by time, and the step by the clock.

The engine of the GRPO job of step.py (128 sequences, Qwen3-0.6B shapes, LoRA r=32, CUDA graphs), at
a context of 314 to 414 tokens for the clock and of 414 to 444 for the kernels.

    python -m benchmarks.gpu.decode --out out/ [--numerics exact]
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import report, shapes
from benchmarks.gpu.step import JOB, SCRATCH
from framework.config import to_typed
from framework.engine.base import SampleRequest
from framework.lora.spec import LoraSpec
from framework.runtime import POLICY, SamplingRuntime, open_sampling
from framework.types import AdapterRef, Prompt, SamplingParams

BEFORE, TIMED, PROFILED = 250, 100, 30


def submit(rt: SamplingRuntime, ref: AdapterRef, name: str, max_tokens: int) -> None:
    for i in range(JOB["prompts"] * JOB["group_size"]):
        prompt = Prompt(token_ids=tuple(range(100 + i, 100 + i + JOB["prompt_tokens"])))
        sampling = SamplingParams(max_tokens=max_tokens, temperature=1.0, ignore_eos=True)
        rt.engine.submit(SampleRequest(request_id=f"{name}{i}", prompt=prompt, sampling=sampling, adapter=ref))


def steps(rt: SamplingRuntime, count: int) -> float:
    """Seconds of so many steps."""
    rt.base.device.synchronize()
    started = time.perf_counter()
    for _ in range(count):
        rt.engine.step()
    rt.base.device.synchronize()
    return time.perf_counter() - started


def measure(rt: SamplingRuntime) -> dict[str, Any]:
    rt.trainer.add_adapter(POLICY, LoraSpec(rank=JOB["rank"]), seed=0)
    ref = rt.weight_sync.push(POLICY)
    submit(rt, ref, "warm", 64)
    while rt.engine.has_unfinished():
        rt.engine.step()
    submit(rt, ref, "measured", JOB["max_tokens"])
    steps(rt, BEFORE)
    seconds = steps(rt, TIMED)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        steps(rt, PROFILED)
    events = sorted(trace.key_averages(), key=lambda e: -e.self_device_time_total)
    kernels = [
        {"us": round(e.self_device_time_total / PROFILED, 1), "calls": e.count / PROFILED, "kernel": e.key[:110]}
        for e in events
    ]
    total = sum(row["us"] for row in kernels)
    return {"step ms": 1e3 * seconds / TIMED, "kernels us": round(total, 1), "by kernel": kernels[:32]}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="qwen3-0.6b")
    parser.add_argument("--numerics", choices=("fast", "exact"), default="fast")
    parser.add_argument("--name", default="decode")
    args = parser.parse_args()
    folder = SCRATCH / args.model
    if not (folder / "tokenizer.json").exists():
        shapes.write_checkpoint(args.model, folder, torch.device("cuda"))
    rt = open_sampling(
        to_typed(
            {
                "run_dir": str(SCRATCH / "decode"),
                "model": {"name_or_path": str(folder)},
                "trainer": {"max_tokens_per_microbatch": JOB["microbatch_tokens"]},
                "engine": {"max_model_len": 1024, "max_num_seqs": JOB["prompts"] * JOB["group_size"]},
                "numerics": args.numerics,
                "lora": {"rank": JOB["rank"]},
                "rollout": {"prompts_per_step": JOB["prompts"], "group_size": JOB["group_size"]},
                "parity": {"probe": False},
                "tracking": {"wandb": "off", "tensorboard": False},
            }
        )
    )
    figures = measure(rt)
    print(f"{figures['step ms']:.2f} ms a step, kernels {figures['kernels us']:.0f} us", flush=True)
    print(report.table(figures["by kernel"][:16]), flush=True)
    report.write(args.out / f"{args.name}.json", figures)
    os._exit(0)  # vLLM's teardown takes long and says nothing


if __name__ == "__main__":
    main()
