"""How long from the end of an optimizer step until the engine samples from the new version?

Three ways in one run: our push (copies into the LoRA slots), vLLM's own reload of the adapter from disk, a merge into
the full weights. The copy's floor is its bytes, read and written, over the measured bandwidth of a plain device copy.
qwen3-4b runs through a real engine; the other models through slots of their shapes alone (same code, no engine behind).

    python -m benchmarks.gpu.push --out out/
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import report, shapes
from framework.device import Device, open_device
from framework.distributed import Mesh, open_mesh
from framework.engine.vllm import internals
from framework.engine.vllm.engine import VllmEngine, VllmOptions
from framework.lora.peft_io import save_peft
from framework.lora.spec import LoraSpec
from framework.models.layout import projections
from framework.models.spec import ModelSpec
from framework.runtime import settle
from framework.trainer.base import LoraShard
from framework.trainer.megatron.adapter import AdapterState
from framework.types import AdamParams, AdapterRef
from framework.weight_sync import VersionCounter, WeightSync

ADAPTER = "policy"
PARENTS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
SCRATCH = Path("/dev/shm/tandem-bench")


class OneAdapter:
    """The part of a trainer that a push needs."""

    def __init__(self, state: AdapterState) -> None:
        self.state = state

    def adapters(self) -> Mapping[str, LoraSpec]:
        return {ADAPTER: self.state.spec}

    def adapter_shards(self, name: str) -> Mapping[str, LoraShard]:
        return self.state.shards()


class BareSlots:
    """Slot tensors of a model's shapes without an engine behind them."""

    num_slots = 2

    def __init__(self, spec: ModelSpec, rank: int, device: torch.device) -> None:
        self.max_rank = rank
        self._ids: list[int | None] = [None] * self.num_slots

        def empty(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.bfloat16, device=device)

        self._rows = [
            {
                p.path: internals.SlotRows(a=empty(rank, p.in_features), b=empty(p.out_features, rank))
                for p in projections(spec, LoraSpec().targets)
            }
            for _ in range(self.num_slots)
        ]

    def rows(self, slot: int, rank: int) -> Mapping[str, internals.SlotRows]:
        return self._rows[slot]

    def bind(self, slot: int, adapter_id: int, rank: int) -> None:
        self._ids[slot] = adapter_id

    def unbind(self, slot: int) -> None:
        self._ids[slot] = None

    def bound_id(self, slot: int) -> int | None:
        return self._ids[slot]


def engine_of_slots(slots: BareSlots, device: Device) -> VllmEngine:
    """The engine's own push code over bare slots."""
    engine = VllmEngine.__new__(VllmEngine)
    vars(engine).update(_slots=slots, _device=device, _slot_of={}, _rank_of={}, _in_flight={}, _plan_of={}, _read_of={})
    return engine


def timed(work: Callable[[], Any], device: Device) -> float:
    device.synchronize()
    started = time.perf_counter()
    work()
    device.synchronize()
    return time.perf_counter() - started


def measure(spec: ModelSpec, rank: int, engine: VllmEngine, mesh: Mesh, device: Device, repeats: int) -> dict[str, Any]:
    """Push alone and push with its proof, each after a real optimizer step."""
    state = AdapterState(spec, LoraSpec(rank=rank), mesh, seed=0, dtype=torch.bfloat16, device=device.torch_device)
    trainer: Any = OneAdapter(state)
    sync = WeightSync(
        trainer, engine, VersionCounter(), synchronize=device.synchronize, check_lockstep=mesh.check_lockstep
    )
    alone, proved = [], []
    settle(host_threads=device.host_threads)
    for index in range(repeats):
        state.grad.normal_()
        state.optim_step(AdamParams(learning_rate=1e-3))
        device.synchronize()
        ref = AdapterRef(name="alone", version=10_000_000 + index, content_hash="")
        alone.append(timed(lambda ref=ref: engine.load_adapter(ref, state.spec, state.shards()), device))
        engine.unload_adapter(ref)
        proved.append(timed(lambda: sync.push(ADAPTER), device))
    size = 2 * state.weights.numel()
    source, target = state.weights, torch.empty_like(state.weights)
    floor = sorted(timed(lambda: target.copy_(source), device) for _ in range(50))[25]
    for ref in list(sync._current.values()):
        engine.unload_adapter(ref)
    warm = repeats // 10
    return {
        "MB": round(size / 1e6, 1),
        "tensors": 2 * len(state.projections),
        "push": report.percentiles(alone[warm:]),
        "push+proof": report.percentiles(proved[warm:]),
        "one plain copy ms": 1e3 * floor,
        "state": state,
    }


def reload_from_disk(engine: VllmEngine, state: AdapterState, name: str, repeats: int = 5) -> list[float]:
    """vLLM's own way: the adapter is saved as a PEFT folder and loaded under a new id."""
    from vllm.lora.request import LoRARequest

    manager = internals.model_runner(engine.llm_engine).lora_manager
    ours = manager.__dict__.pop("_load_adapter")
    seconds = []
    for index in range(repeats):
        folder = SCRATCH / f"adapter-{index}"
        started = time.perf_counter()
        tensors = {key: tensor.numpy() for key, tensor in state.gather().items()}
        save_peft(folder, spec=state.spec, tensors=tensors, base_model=name, dtype=torch.bfloat16)
        manager.add_adapter(LoRARequest(f"disk-{index}", 20_000_000 + index, str(folder)))
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
        manager.remove_adapter(20_000_000 + index)
    manager._load_adapter = ours
    return seconds


def merge(engine: VllmEngine, state: AdapterState, repeats: int = 5) -> list[float]:
    """W + B A into every weight the engine reads; leaves them merged, so it comes last."""
    weights, seconds = engine.base_weights(), []
    for _ in range(repeats):
        torch.cuda.synchronize()
        started = time.perf_counter()
        for p in state.projections:
            begin = sum(p.sibling_rows[: p.slice_index])
            rows = weights[p.parent + ".weight"][begin : begin + p.out_features]
            shard = state.shards()[p.path]
            torch.addmm(rows, shard.b, shard.a, out=rows)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return seconds


def row_of(model: str, rank: int, figures: dict[str, Any]) -> dict[str, Any]:
    push, proof = figures["push"], figures["push+proof"]
    return {
        "model": model,
        "rank": rank,
        "MB": figures["MB"],
        "push p50 ms": push["p50_ms"],
        "push p99 ms": push["p99_ms"],
        "+proof p50": proof["p50_ms"],
        "+proof p99": proof["p99_ms"],
        "plain copy ms": figures["one plain copy ms"],
        "disk s": figures.get("disk s", float("nan")),
        "merge ms": figures.get("merge ms", float("nan")),
    }


def start_engine(model: str, max_lora_rank: int, mesh: Mesh, device: Device) -> tuple[ModelSpec, VllmEngine]:
    """A real engine over random weights, without graphs."""
    spec = shapes.write_checkpoint(model, SCRATCH / model, device.torch_device)
    torch.cuda.empty_cache()
    options = VllmOptions(
        max_model_len=1024,
        max_num_seqs=64,
        max_num_batched_tokens=2048,
        max_adapters=2,
        max_lora_rank=max_lora_rank,
        lora_parents=PARENTS,
        kv_cache_bytes=2**30,
        gpu_memory_utilization=0.4,
        enforce_eager=True,
        enable_prefix_caching=True,
        exact=False,
    )
    return spec, VllmEngine(SCRATCH / model, options, mesh=mesh, device=device, dtype=torch.bfloat16)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=220)
    args = parser.parse_args()
    device = open_device("auto", local_rank=0)
    mesh = open_mesh(device, tensor_parallel_size=1, timeout_s=60.0)
    results: dict[str, Any] = {}
    rows = []
    for model in ("qwen3-0.6b", "qwen3-4b", "qwen3-8b"):
        spec = shapes.write_config(model, SCRATCH / "configs" / model)
        for rank in (8, 32, 128):
            engine = engine_of_slots(BareSlots(spec, rank, device.torch_device), device)
            results[f"{model} r={rank}"] = measure(spec, rank, engine, mesh, device, args.repeats // 2)
            rows.append(row_of(model, rank, results[f"{model} r={rank}"]))
            print(rows[-1], flush=True)
            del engine
    spec, engine = start_engine("qwen3-4b", 32, mesh, device)
    figures = measure(spec, 32, engine, mesh, device, args.repeats)
    disk = reload_from_disk(engine, figures["state"], "qwen3-4b")
    merged = merge(engine, figures["state"])
    figures |= {"disk s": min(disk), "merge ms": 1e3 * min(merged), "disk seconds": disk, "merge seconds": merged}
    results["qwen3-4b r=32, in the engine"] = figures
    rows.append(row_of("4b, in the engine", 32, figures))
    print(report.table(rows), flush=True)
    for entry in results.values():
        entry.pop("state")
    report.write(args.out / "push.json", results)
    shutil.rmtree(SCRATCH)


if __name__ == "__main__":
    main()
