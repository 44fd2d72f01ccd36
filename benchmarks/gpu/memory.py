"""What the pair takes of the device: the plan at the start, the engine asleep, and many sleeps with training between.

Qwen3-4B shapes with random weights, LoRA r=32 on all linears, the pair opened as a recipe opens it, its KV cache
computed. The bound for the pair asleep with an idle trainer: 1.10 times the bf16 weights, the adapter's state, 1 GiB.

    python -m benchmarks.gpu.memory --out out/ [--graphs] [--microbatch-tokens 16384]
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import report, shapes
from framework.algorithms.supervised import CrossEntropy
from framework.config import RunConfig, to_typed
from framework.engine.base import SampleRequest, generate
from framework.memory import full_microbatch
from framework.pair import Base, Pair, open_base, open_pair
from framework.runtime import POLICY
from framework.types import AdamParams, AdapterRef, Prompt, SamplingParams

SCRATCH = Path("/dev/shm/tandem-bench")
GIB = 2**30
CYCLE_TOKENS = 1024
"""Of the training step in each cycle but the first and the last, which are of the whole budget."""
CYCLES_WARM = 3


def config(model: Path, args: argparse.Namespace) -> RunConfig:
    """What a user would write, and the cache left to be computed."""
    return to_typed(
        {
            "model": {"name_or_path": str(model)},
            "trainer": {"max_tokens_per_microbatch": args.microbatch_tokens, "recompute": args.recompute},
            "engine": {"max_model_len": 4096, "max_num_seqs": 128, "enforce_eager": None if args.graphs else True},
            "lora": {"rank": args.rank},
        }
    )


def used(base: Base) -> float:
    """GiB of the device that are not free, the CUDA context and other libraries included; nothing cached by torch."""
    base.device.synchronize()
    base.device.release_cached()
    return (base.device.memory_total() - base.device.memory_free()) / GIB


def taken_apart() -> dict[str, float]:
    """GiB of what this process holds of the device: by torch's own pool, and by vLLM's, which torch does not count."""
    from vllm.device_allocator.cumem import CuMemAllocator

    pools: dict[str, float] = {}
    for data in CuMemAllocator.get_instance().pointer_to_data.values():
        if not data.is_asleep:
            pools[data.tag] = pools.get(data.tag, 0.0) + data.handle[1] / GIB
    torch_s = {"allocated": torch.cuda.memory_allocated() / GIB, "reserved": torch.cuda.memory_reserved() / GIB}
    return {**{f"torch, {k}": v for k, v in torch_s.items()}, **{f"vLLM's pool, {k}": v for k, v in pools.items()}}


def tokens(pair: Pair, ref: AdapterRef) -> list[tuple[int, ...]]:
    """Greedy completions of eight prompts."""
    sampling = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
    prompts = [Prompt(token_ids=tuple(range(9 * i, 9 * i + 40))) for i in range(8)]
    requests = [
        SampleRequest(request_id=str(i), prompt=prompt, sampling=sampling, adapter=ref)
        for i, prompt in enumerate(prompts)
    ]
    return [completion.token_ids for completion in generate(pair.engine, requests)]


def train(pair: Pair, base: Base, num_tokens: int) -> None:
    """One step that changes nothing."""
    batch = full_microbatch(base.spec.vocab_size, num_tokens, min(num_tokens, 4096), multiple_of=1)
    pair.trainer.forward_backward(POLICY, batch, CrossEntropy())
    pair.trainer.optim_step(POLICY, AdamParams(learning_rate=0.0))


def cycles(pair: Pair, base: Base, ref: AdapterRef, count: int, budget: int) -> dict[str, Any]:
    """Memory and milliseconds over sleeps with a training step in each; tokens are sampled after each wake."""
    after_wake: list[list[tuple[int, ...]]] = []  # all with an empty prefix cache: a kept prefix rounds otherwise
    awake, asleep, sleeps, wakes = [], [], [], []
    for cycle in range(count):
        start = time.perf_counter()
        pair.engine.sleep()
        base.device.synchronize()
        sleeps.append(time.perf_counter() - start)
        train(pair, base, budget if cycle in (0, count - 1) else CYCLE_TOKENS)
        base.device.synchronize()
        if cycle in (CYCLES_WARM, count - 1):
            asleep.append(used(base))
        start = time.perf_counter()
        pair.engine.wake()
        base.device.synchronize()
        wakes.append(time.perf_counter() - start)
        after_wake.append(tokens(pair, ref))
        if cycle in (CYCLES_WARM, count - 1):
            awake.append(used(base))
    return {
        "cycles": count,
        "asleep GiB": asleep,
        "awake GiB": awake,
        "residue MiB": {"asleep": 1024 * (asleep[1] - asleep[0]), "awake": 1024 * (awake[1] - awake[0])},
        "sleep": report.percentiles(sleeps),
        "wake": report.percentiles(wakes),
        "same tokens": all(sampled == after_wake[0] for sampled in after_wake),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="qwen3-4b")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--cycles", type=int, default=200)
    parser.add_argument("--microbatch-tokens", type=int, default=16384)
    parser.add_argument("--recompute", default="full")
    parser.add_argument("--graphs", action="store_true")
    parser.add_argument("--name", default="memory")
    args = parser.parse_args()
    folder = SCRATCH / args.model
    if not (folder / "tokenizer.json").exists():
        shapes.write_checkpoint(args.model, folder, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        torch.cuda.empty_cache()
    cfg = config(folder, args)
    base = open_base(cfg)
    empty = used(base)
    torch.zeros(1, device=base.device.torch_device)
    context = used(base)
    start = time.perf_counter()
    pair = open_pair(cfg, base)
    assert pair.plan is not None
    figures: dict[str, Any] = {
        "start s": time.perf_counter() - start,
        "before GiB": empty,
        "with a context GiB": context,
        "plan": asdict(pair.plan),
    }
    print(pair.plan, f"started in {figures['start s']:.0f} s", flush=True)
    pair.trainer.add_adapter(POLICY, cfg.lora, seed=0)
    ref = pair.weight_sync.push(POLICY)
    tokens(pair, ref)
    weights = sum(tensor.nbytes for tensor in pair.engine.base_weights().values())
    tied = {tensor.data_ptr(): tensor.nbytes for tensor in pair.engine.base_weights().values()}
    state = sum(tensor.nbytes for tensor in pair.trainer.state_dict(POLICY).values())
    state += sum(s.a.nbytes + s.b.nbytes for s in pair.trainer.adapter_shards(POLICY).values())
    pair.engine.sleep()
    figures["asleep, trainer idle"] = {
        "GiB of the device": used(base),
        "weights GiB": sum(tied.values()) / GIB,
        "weights as named GiB": weights / GIB,
        "adapter's state GiB": state / GIB,
        "bound GiB": (1.10 * sum(tied.values()) + state) / GIB + 1.0,
        "taken apart GiB": taken_apart(),
    }
    print(figures["asleep, trainer idle"], flush=True)
    report.write(args.out / f"{args.name}.json", figures)
    pair.engine.wake()
    figures["cycles"] = cycles(pair, base, ref, args.cycles, args.microbatch_tokens)
    print(figures["cycles"], flush=True)
    report.write(args.out / f"{args.name}.json", figures)
    os._exit(0)  # vLLM's teardown takes long and says nothing


if __name__ == "__main__":
    main()
