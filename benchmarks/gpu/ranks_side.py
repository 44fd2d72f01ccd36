"""What benchmarks/gpu/ranks.py starts on every rank."""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.step_tandem import Episode, Texts
from framework.algorithms.supervised import CrossEntropy
from framework.config import RunConfig, to_typed
from framework.data.chat import Chat
from framework.environments.base import StepResult
from framework.memory import full_microbatch
from framework.runtime import POLICY, SamplingRuntime, open_sampling
from framework.types import AdamParams, Completion
from recipes import grpo

COLLECTIVES = ("nccl:", "gloo:")
"""How torch's profiler names what a backend runs."""


class EvenTokens(Episode):
    """Rewards the share of even token ids: every sampled token of any model has a say in it."""

    def step(self, completion: Completion) -> StepResult:
        even = sum(token % 2 == 0 for token in completion.token_ids)
        return StepResult(reward=even / max(1, len(completion.token_ids)), done=True)


class Problems(Texts):
    """The job's prompts."""

    def make(self, index: int) -> EvenTokens:
        return EvenTokens(self._chat, self._texts[index])


def even_tokens(chat: Chat, *, split: str, seed: int) -> Problems:
    """``environment.name=benchmarks.gpu.ranks_side.even_tokens``."""
    return Problems(chat, json.loads(Path(sys.argv[1]).read_text())["texts"])


def config(job: dict[str, Any]) -> RunConfig:
    """The recipe's defaults but for the job."""
    return to_typed(
        {
            "recipe": "grpo",
            "num_steps": job["steps"],
            "run_dir": f"{job['scratch']}/{job['tensor_parallel']}-{job['prompts']}",
            "model": {"name_or_path": job["model"]},
            "parallel": {"tensor_parallel_size": job["tensor_parallel"]},
            "engine": {"max_model_len": 512, "max_num_seqs": job["prompts"] * job["group_size"]},
            "lora": {"rank": job["rank"], "alpha": 2.0 * job["rank"]},
            "environment": {"name": "benchmarks.gpu.ranks_side.even_tokens"},
            "sampling": {"max_tokens": job["max_tokens"]},
            "rollout": {"prompts_per_step": job["prompts"], "group_size": job["group_size"]},
            "parity": {"probe": False},  # made for trained models: a random one hardly notices an adapter
            "evaluation": {"every": 0, "num_problems": 1},
            "tracking": {"wandb": "off", "tensorboard": False},
        }
    )


def steps(rt: SamplingRuntime) -> dict[str, float]:
    """Medians by phase, the first two steps left out; tokens per second are of all ranks together."""
    rows = [json.loads(line) for line in (rt.run_dir / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "time/step_s" in row][2:]
    names = [name for name in rows[0] if name.startswith("time/")]
    return {name.removeprefix("time/"): statistics.median(row[name] for row in rows) for name in names}


def replicated(rt: SamplingRuntime) -> bool:
    """Whether the factors that every rank of a tensor-parallel group holds whole are the same bits on all of them."""
    digest = hashlib.blake2b()
    for path, shard in sorted(rt.trainer.adapter_shards(POLICY).items()):
        whole = shard.b if path.endswith(("o_proj", "down_proj")) else shard.a
        digest.update(whole.contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return len(set(rt.mesh.all_gather(digest.hexdigest()))) == 1


def pushes(rt: SamplingRuntime, count: int) -> dict[str, Any]:
    """Milliseconds of a push with its proof, after real optimizer steps; collectives of five of them."""
    batch = full_microbatch(rt.base.spec.vocab_size, 128, 64, multiple_of=rt.trainer.token_multiple)

    def train() -> None:
        rt.trainer.forward_backward(POLICY, batch, CrossEntropy())
        rt.trainer.optim_step(POLICY, AdamParams(learning_rate=1e-5))
        rt.base.device.synchronize()

    seconds = []
    for _ in range(count):
        train()
        rt.mesh.barrier()
        start = time.perf_counter()
        rt.weight_sync.push(POLICY)
        seconds.append(time.perf_counter() - start)
    seen: Counter[str] = Counter()
    for _ in range(5):
        train()
        with torch.profiler.profile() as profile:
            rt.weight_sync.push(POLICY)
        seen.update(event.name for event in profile.events() or () if event.name.startswith(COLLECTIVES))
    ordered = sorted(1e3 * s for s in seconds)
    return {
        "p50 ms": ordered[len(ordered) // 2],
        "p99 ms": ordered[int(0.99 * (len(ordered) - 1))],
        "collectives of a push": {name: number / 5 for name, number in seen.items()},
    }


def lockstep(rt: SamplingRuntime, count: int = 200) -> float:
    """Milliseconds of one comparison between the ranks of a group."""
    start = time.perf_counter()
    for number in range(count):
        rt.mesh.check_lockstep("a measurement", ("rollout", number, 0.7))
    return 1e3 * (time.perf_counter() - start) / count


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    cfg = config(job)
    rt = open_sampling(cfg)
    grpo.run(cfg, rt)
    same = replicated(rt)
    pushed = pushes(rt, job["pushes"])
    compared = lockstep(rt)
    if rt.mesh.rank == 0:
        result = {**steps(rt), "replicated factors equal": same, "push": pushed, "lockstep ms": compared}
        Path(sys.argv[2]).write_text(json.dumps(result))
    rt.mesh.barrier()
    os._exit(0)  # vLLM's teardown takes long and says nothing


if __name__ == "__main__":
    main()
