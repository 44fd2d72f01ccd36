"""Which attention kernel is fastest for packed causal sequences with grouped heads, forward and backward?

FLOPs count the causal half: forward 2 x length^2 x heads x head size per sequence, backward 2.5 times that.

    python -m benchmarks.gpu.attention --out out/
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.testing import do_bench

from benchmarks.gpu import report
from framework.device import open_device
from framework.engine.vllm.attention import open_attention
from framework.trainer.megatron import cudnn_backward
from framework.trainer.megatron import flash as torch_flash

DIM = 128


def flash(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, longest: int) -> Tensor:
    """torch's variable-length flash kernel, grouped heads as they are."""
    return torch.ops.aten._flash_attention_forward(q, k, v, offsets, offsets, longest, longest, 0.0, True, False)[0]


def flash_repeated(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, longest: int) -> Tensor:
    """The same with key and value heads repeated."""
    times = q.shape[1] // k.shape[1]
    return flash(q, k.repeat_interleave(times, 1), v.repeat_interleave(times, 1), offsets, longest)


def dense(backend: SDPBackend) -> Callable[..., Tensor]:
    """scaled_dot_product_attention, for sequences of one length."""

    def run(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, longest: int) -> Tensor:
        batch = [x.unflatten(0, (-1, longest)).transpose(1, 2) for x in (q, k, v)]
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(*batch, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        return out.transpose(1, 2).flatten(0, 1)

    return run


def engine_and(backward: Callable[..., Any]) -> Callable[..., Tensor]:
    """The engine's forward pass with another's backward kernel, as the trainer runs several sequences."""

    def run(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, longest: int) -> Tensor:
        kernel = open_attention(open_device("cuda", local_rank=0))
        packed = SimpleNamespace(kernel=kernel, backward=backward, cu_seqlens=offsets, max_seqlen=longest)
        return torch_flash.FlashAttention.apply(q, k, v, packed)

    return run


KERNELS = {
    "flash varlen, grouped": flash,
    "flash varlen, repeated": flash_repeated,
    "cudnn dense": dense(SDPBackend.CUDNN_ATTENTION),
    "flash dense": dense(SDPBackend.FLASH_ATTENTION),
    "engine's forward, flash varlen backward": engine_and(torch_flash.attention_backward),
}
if cudnn_backward.load():  # before the first of them opens cuDNN
    KERNELS["engine's forward, Transformer Engine's backward"] = engine_and(cudnn_backward.attention_backward)


def measure(name: str, heads: int, kv_heads: int, sequences: int, length: int) -> dict[str, Any]:
    """TFLOP/s forward and backward, and the difference from float64 on a short prefix."""
    total = sequences * length
    q = torch.randn(total, heads, DIM, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(total, kv_heads, DIM, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    offsets = torch.arange(0, total + 1, length, device="cuda", dtype=torch.int32)
    function = KERNELS[name]
    flops = 2.0 * sequences * length**2 * heads * DIM
    row: dict[str, Any] = {"kernel": name, "heads": f"{heads}/{kv_heads}", "lengths": f"{sequences}x{length}"}
    try:
        with torch.no_grad():
            out = function(q, k, v, offsets, length)
            row["error"] = difference(out, q, k, v)
            row["forward TFLOP/s"] = (
                flops / do_bench(lambda: function(q, k, v, offsets, length), return_mode="median") / 1e9
            )
        for x in (q, k, v):
            x.requires_grad_()
        out = function(q, k, v, offsets, length)
        grad = torch.randn_like(out)
        run = lambda: torch.autograd.grad(out, (q, k, v), grad, retain_graph=True)  # noqa: E731
        row["backward TFLOP/s"] = 2.5 * flops / do_bench(run, return_mode="median") / 1e9
    except Exception as error:  # noqa: BLE001 - a kernel that cannot is a row of the table
        row["failed"] = f"{type(error).__name__}: {error}"[:160]
    return row


def difference(out: Tensor, q: Tensor, k: Tensor, v: Tensor, rows: int = 64) -> float:
    """Relative to float64 over the first rows, all heads."""
    times = q.shape[1] // k.shape[1]
    qd, kd, vd = (
        q[:rows].double(),
        k[:rows].repeat_interleave(times, 1).double(),
        v[:rows].repeat_interleave(times, 1).double(),
    )
    scores = torch.einsum("qhd,khd->hqk", qd, kd) / DIM**0.5
    future = torch.ones(rows, rows, device=q.device, dtype=torch.bool).triu(1)
    want = torch.einsum("hqk,khd->qhd", scores.masked_fill(future, float("-inf")).softmax(-1), vd)
    return float((out[:rows].double() - want).norm() / want.norm())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    rows = []
    for heads, kv_heads in ((16, 8), (32, 8)):
        for sequences, length in ((1, 16384), (16, 1024)):
            for name in KERNELS:
                rows.append(measure(name, heads, kv_heads, sequences, length))
                print(rows[-1], flush=True)
    report.write(args.out / "attention.json", rows)


if __name__ == "__main__":
    main()
