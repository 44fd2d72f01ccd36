"""What does an adapter cost in one decode step, kernel path by kernel path, without an engine around it?

Eight layers of Qwen3-4B's linears with weights of their own (so that nothing stays in the cache), 128 tokens of one
adapter among two slots, r=32, replayed as one CUDA graph. Microseconds per layer.

    python -m benchmarks.gpu.lora_kernels --out out/
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.gpu import report

LINEARS = {
    "qkv_proj": (2560, (4096, 1024, 1024)),
    "o_proj": (4096, (2560,)),
    "gate_up_proj": (2560, (9728, 9728)),
    "down_proj": (9728, (2560,)),
}
"""Input width and rows of each slice."""
LAYERS, TOKENS, SLOTS = 8, 128, 2


class Linear:
    """One fused linear with its slots, A behind the weight."""

    def __init__(self, width: int, sizes: tuple[int, ...], rank: int) -> None:
        self.out = sum(sizes)
        more = len(sizes) * SLOTS * rank
        self.extended = torch.randn(self.out + more, width, device="cuda", dtype=torch.bfloat16) * width**-0.5
        self.weight = self.extended[: self.out]
        self.a = tuple(self.extended[self.out :].view(len(sizes), SLOTS, 1, rank, width).unbind(0))
        self.a_one = torch.cat([a[1, 0] for a in self.a])
        self.b = [torch.randn(SLOTS, 1, size, rank, device="cuda", dtype=torch.bfloat16) * 0.1 for size in sizes]
        self.sizes, self.rank = sizes, rank

    def reference(self, x: Tensor, slot: Tensor) -> Tensor:
        """In float64."""
        y = x.double() @ self.weight.double().t()
        parts = y.split(self.sizes, dim=1)
        for part, a, b in zip(parts, self.a, self.b, strict=True):
            for s in range(SLOTS):
                delta = (x.double() @ a[s, 0].double().t()) @ b[s, 0].double().t()
                part.add_(delta * (slot == s)[:, None])
        return y


def meta_of(slot: Tensor, active: int) -> tuple[Any, ...]:
    from vllm.lora.ops.triton_ops import LoRAKernelMeta

    meta = LoRAKernelMeta.make(SLOTS, TOKENS, device="cuda")
    meta.prepare_tensors(slot)
    meta.num_active_loras_cpu.fill_(active)
    return meta.meta_args(TOKENS, True)


def engine_path(linear: Linear, x: Tensor, meta: tuple[Any, ...]) -> Tensor:
    """vLLM's own: product, zero, shrink, expand."""
    from vllm.lora.ops.triton_ops import lora_expand, lora_shrink

    y = F.linear(x, linear.weight)
    u = torch.empty(len(linear.sizes), TOKENS, linear.rank, device="cuda")
    lora_shrink(x, linear.a, u, *meta, 1.0)
    lora_expand(u, tuple(linear.b), y, *meta, offset_start=0, add_inputs=True)
    return y


def blas_path(linear: Linear, x: Tensor) -> Tensor:
    """cuBLAS for one adapter: product, shrink, one expand per slice."""
    y = F.linear(x, linear.weight)
    u = F.linear(x, linear.a_one)
    for index, (part, b) in enumerate(zip(y.split(linear.sizes, dim=1), linear.b, strict=True)):
        part.addmm_(u[:, index * linear.rank : (index + 1) * linear.rank], b[1, 0].t())
    return y


def time_us(work: Callable[[], Any], repeats: int = 50) -> float:
    """Per layer, of a captured graph."""
    for _ in range(3):
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    graph.replay()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(repeats):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) * 1000 / repeats / LAYERS


def paths(rank: int) -> dict[str, dict[str, float]]:
    """Microseconds by path, for each linear and for all."""
    from framework.engine.vllm.fused_lora import expand

    layers = [{name: Linear(width, sizes, rank) for name, (width, sizes) in LINEARS.items()} for _ in range(LAYERS)]
    slot = torch.ones(TOKENS, dtype=torch.int32, device="cuda")
    inputs = {width: torch.randn(TOKENS, width, device="cuda", dtype=torch.bfloat16) for width in (2560, 4096, 9728)}
    metas = {active: meta_of(slot, active) for active in (1, SLOTS + 1)}
    works: dict[str, Callable[[Linear, Tensor], Tensor]] = {
        "base": lambda linear, x: F.linear(x, linear.weight),
        "vLLM's kernels": lambda linear, x: engine_path(linear, x, metas[SLOTS + 1]),
        "vLLM's kernels, grid of one adapter": lambda linear, x: engine_path(linear, x, metas[1]),
        "cuBLAS, one adapter": blas_path,
        "A behind the weight: product alone": lambda linear, x: F.linear(x, linear.extended),
        "A behind the weight": lambda linear, x: expand(F.linear(x, linear.extended), linear.b, slot),
    }
    mixed = torch.randint(-1, SLOTS, (TOKENS,), dtype=torch.int32, device="cuda")
    for linear in layers[0].values():
        x = inputs[linear.weight.shape[1]]
        for slots in (slot, mixed, torch.full_like(slot, -1)):
            want = linear.reference(x, slots)
            got = expand(F.linear(x, linear.extended), linear.b, slots)
            error = float((got.double() - want).norm() / want.norm())
            assert error < 4e-3, f"{linear.sizes}: {error}"
    figures: dict[str, dict[str, float]] = {}
    for what, work in works.items():
        figures[what] = {
            name: time_us(partial(run, work, [layer[name] for layer in layers], inputs)) for name in LINEARS
        }
        every = [linear for layer in layers for linear in layer.values()]
        figures[what]["all four"] = time_us(partial(run, work, every, inputs))
        print(rank, what, {key: round(value, 1) for key, value in figures[what].items()}, flush=True)
    return figures


def run(work: Callable[[Linear, Tensor], Tensor], linears: list[Linear], inputs: dict[int, Tensor]) -> None:
    for linear in linears:
        work(linear, inputs[linear.weight.shape[1]])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--name", default="lora_kernels")
    args = parser.parse_args()
    report.write(args.out / f"{args.name}.json", {f"rank {rank}": paths(rank) for rank in (16, 32)})


if __name__ == "__main__":
    main()
