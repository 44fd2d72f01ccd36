"""How long does a push take on a CPU, beside one memory copy of as many bytes?

SmolLM2, LoRA r=16 on all linears. ``push`` is what stands between the optimizer step and an engine that samples from
the new adapter: the copy of every factor into a slot of vLLM, and the slot's binding. ``push and proof`` is
:meth:`framework.weight_sync.WeightSync.push`: that, the comparison of the ranks, and the slots read back and compared.
The floor is one contiguous ``Tensor.copy_``. All three in turns, each push after a real optimizer step.

    .venv/bin/python -m benchmarks.push
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from benchmarks import report
from framework.config import ModelConfig, RunConfig
from framework.lora.spec import LoraSpec
from framework.models.hub import DEFAULT_MODEL
from framework.pair import open_base, open_pair
from framework.runtime import POLICY, settle, versions
from framework.types import AdapterRef


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def milliseconds(values: list[float]) -> dict[str, float]:
    """Median and 99th percentile."""
    ordered = sorted(values)
    return {"p50_ms": 1e3 * ordered[len(ordered) // 2], "p99_ms": 1e3 * ordered[int(0.99 * (len(ordered) - 1))]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=220)
    arguments = parser.parse_args()
    machine = report.machine()
    spec = LoraSpec(rank=arguments.rank, alpha=2.0 * arguments.rank)
    cfg = RunConfig(model=ModelConfig(name_or_path=arguments.model), lora=spec)
    base = open_base(cfg)
    pair = open_pair(cfg, base)
    engine, trainer, sync = pair.engine, pair.trainer, pair.weight_sync
    trainer.add_adapter(POLICY, spec, seed=0)
    sync.push(POLICY)
    shards = trainer.adapter_shards(POLICY)
    count = sum(factor.numel() for shard in shards.values() for factor in (shard.a, shard.b))
    source = torch.randn(count, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    settle(host_threads=base.device.host_threads)
    figures: dict[str, list[float]] = {"push": [], "push and proof": [], "one copy": []}
    for index in range(arguments.repeats):
        # As in a step: other memory has passed through the caches since the last push.
        torch.ones(2**24).sum()
        ref = AdapterRef(name="alone", version=10_000_000 + index, content_hash="")
        figures["push"].append(seconds(lambda ref=ref: engine.load_adapter(ref, spec, trainer.adapter_shards(POLICY))))
        engine.unload_adapter(ref)
        torch.ones(2**24).sum()
        figures["push and proof"].append(seconds(lambda: sync.push(POLICY)))
        torch.ones(2**24).sum()
        figures["one copy"].append(seconds(lambda: target.copy_(source)))
    warm = arguments.repeats // 10
    results = {name: milliseconds(values[warm:]) for name, values in figures.items()}
    ratio = results["push"]["p50_ms"] / results["one copy"]["p50_ms"]
    print(report.table([{"what": name, **values} for name, values in results.items()]))
    print(f"{2 * count / 1e6:.1f} MB in {2 * len(shards)} tensors; push / one copy: {ratio:.2f} (wanted: at most 3)")
    job = {"rank": arguments.rank, "bytes": 2 * count, "tensors": 2 * len(shards), "repeats": arguments.repeats - warm}
    report.write("push", {"ratio": ratio, **results, "job": job}, machine=machine, versions=versions())


if __name__ == "__main__":
    main()
