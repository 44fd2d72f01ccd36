"""How fast does one GPU train a LoRA adapter at 16,384 tokens, with what memory, and which kernels take the time?

Tokens/s counts whole steps (forward, backward, AdamW). MFU counts as prime-rl does (its trainer/perf.py): a token costs
4 x the parameters of all matrix products + 6 x the adapter's + 12 x layers x heads x (hidden // heads) x sequence
length, over 989 TFLOP/s. Recomputation and causality are not counted, there or here.

    python -m benchmarks.gpu.training --out out/ [--case qwen3-4b:full:1x16384 ...]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import report, shapes
from framework.algorithms.supervised import CrossEntropy
from framework.batching import Batch, make_batch
from framework.device import Device, open_device
from framework.distributed import open_mesh
from framework.engine.vllm.attention import open_attention
from framework.lora.spec import LoraSpec
from framework.models.layout import projections
from framework.models.spec import ModelSpec
from framework.trainer.megatron.trainer import MegatronTrainer
from framework.types import AdamParams, Datum

PEAK_FLOPS = 989e12
PRIME_RL = {"qwen3-0.6b": (13340.0, 5.1), "qwen3-4b": (6230.0, 23.3)}
"""tokens/s and GiB that prime-rl publishes for one H100, LoRA r=16, sequence 16,384, full recompute."""
RANK = 16
CASES = (
    "qwen3-0.6b:full:1x16384",
    "qwen3-0.6b:all_but_attention:1x16384",
    "qwen3-4b:full:1x16384",
    "qwen3-4b:all_but_attention:1x16384",
    "qwen3-4b:full:16x1024",
)


def flops_per_token(spec: ModelSpec, sequence: int) -> float:
    """prime-rl's count, its head size included (hidden // heads, which Qwen3 does not have)."""
    whole = projections(spec, LoraSpec().targets)
    shapes_of = [(p.out_features, p.in_features) for p in whole]
    products = sum(out * inner for out, inner in shapes_of) + spec.vocab_size * spec.hidden_size
    adapter = sum(RANK * (out + inner) for out, inner in shapes_of)
    attention = 12 * spec.num_layers * spec.num_heads * (spec.hidden_size // spec.num_heads) * sequence
    return 4.0 * products + 6.0 * adapter + attention


def random_batch(spec: ModelSpec, sequences: int, length: int) -> Batch:
    """One microbatch of random tokens, every one scored."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, spec.vocab_size, (sequences, length + 1), generator=generator).tolist()
    datums = [Datum(token_ids=tuple(row), loss_mask=(False, *[True] * length)) for row in tokens]
    return make_batch(datums, aggregation="token_mean", max_tokens=sequences * length)


def profile(step: Callable[[], None], top: int = 25) -> list[dict[str, Any]]:
    """Kernels of one step by time."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        step()
    events = sorted(trace.key_averages(), key=lambda e: -e.self_device_time_total)
    total = sum(e.self_device_time_total for e in events)
    return [
        {
            "ms": round(e.self_device_time_total / 1e3, 2),
            "share": round(e.self_device_time_total / total, 4),
            "calls": e.count,
            "kernel": e.key[:110],
        }
        for e in events[:top]
    ]


def run_case(case: str, device: Device, folder: Path, steps: int, *, with_profile: bool) -> dict[str, Any]:
    """Figures of one ``model:recompute:sequencesxlength``."""
    name, recompute, layout = case.split(":")
    sequences, length = (int(x) for x in layout.split("x"))
    spec = shapes.write_config(name, folder / name)
    mesh = open_mesh(device, tensor_parallel_size=1, timeout_s=60.0)
    trainer = MegatronTrainer(
        spec,
        shapes.random_shard(spec, device.torch_device),
        mesh=mesh,
        device=device,
        dtype=torch.bfloat16,
        sequence_parallel=False,
        recompute=recompute,
        attention=open_attention(device),
    )
    trainer.add_adapter("a", LoraSpec(rank=RANK), seed=0)
    batch = random_batch(spec, sequences, length)

    def step() -> None:
        trainer.forward_backward("a", batch, CrossEntropy())  # noqa: F821 - deleted only after the last step
        trainer.optim_step("a", AdamParams(learning_rate=1e-4))  # noqa: F821

    started = time.perf_counter()
    for _ in range(2):
        step()
    device.synchronize()
    warm_up_s = time.perf_counter() - started
    device.reset_peak_memory()
    seconds = []
    for _ in range(steps):
        started = time.perf_counter()
        step()
        device.synchronize()
        seconds.append(time.perf_counter() - started)
    middle = sorted(seconds)[len(seconds) // 2]
    speed = sequences * length / middle
    published = PRIME_RL.get(name, (float("nan"), float("nan"))) if layout == "1x16384" else (float("nan"),) * 2
    figures = {
        "case": case,
        "tokens_per_s": round(speed, 1),
        "x prime-rl": round(speed / published[0], 3),
        "MFU %": round(100 * flops_per_token(spec, length) * speed / PEAK_FLOPS, 1),
        "peak GiB": round(device.peak_memory_allocated() / 2**30, 2),
        "reserved GiB": round(torch.cuda.max_memory_reserved() / 2**30, 2),
        "prime-rl GiB": published[1],
        "warm-up s": round(warm_up_s, 1),
    }
    details = {"seconds": seconds, "profile": profile(step) if with_profile else []}
    del trainer, batch
    torch.cuda.empty_cache()
    return {**figures, **details}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--case", nargs="*", default=list(CASES))
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--profile", nargs="*", default=["qwen3-0.6b:full:1x16384", "qwen3-4b:full:1x16384"])
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    device = open_device(args.device, local_rank=0)
    results = []
    for case in args.case:
        try:
            results.append(
                run_case(case, device, Path(tempfile.mkdtemp()), args.steps, with_profile=case in args.profile)
            )
        except torch.OutOfMemoryError as error:
            results.append({"case": case, "tokens_per_s": 0.0, "error": str(error)[:200]})
            torch.cuda.empty_cache()
        print({k: v for k, v in results[-1].items() if k not in ("seconds", "profile")}, flush=True)
        for line in results[-1].get("profile", []):
            print("  ", line["ms"], line["share"], line["calls"], line["kernel"])
    report.write(args.out / "training.json", results)


if __name__ == "__main__":
    main()
