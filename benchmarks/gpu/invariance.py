"""Do the bits of a row depend on the batch it is computed in, and what does it cost if they must not?

Products of decode steps by the library (cuBLAS) and by framework/kernels/product.py: the share of elements of the first
rows that differ from those of a large batch, and times. Then decode attention by the number of pieces into which keys
are cut. Attention's own bits are held by tests/engine/vllm/test_attention_splits.py.

    python -m benchmarks.gpu.invariance --out out/
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from triton.testing import do_bench_cudagraph

from benchmarks.gpu import report
from framework.kernels.product import product

# inner dimension, rows of the weight with the rows of two r=32 adapters behind them
SHAPES = {
    "smollm2-135m": ((576, 1152), (576, 640), (576, 3200), (1536, 640)),
    "qwen3-0.6b": ((1024, 4288), (2048, 1088), (1024, 6272), (3072, 1088)),
    "qwen3-4b": ((2560, 6336), (4096, 2624), (2560, 19584), (9728, 2624)),
}
HEADS = ((9, 3, 64), (16, 8, 128), (32, 8, 128))
BATCHES = ((128, 128), (128, 320), (128, 576), (16, 576), (4, 576), (16, 4096))
PAGE = 16


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def microseconds(call: Callable[[], Any]) -> float:
    return round(1e3 * do_bench_cudagraph(call), 2)


def products() -> list[dict[str, Any]]:
    rows = []
    for model, shapes in SHAPES.items():
        for inner, size in shapes:
            x, weight = draw(16384, inner), 0.05 * draw(size, inner)
            whole = torch.nn.functional.linear(x, weight)
            for count in (1, 16, 64, 128, 256):
                few = x[:count].contiguous()
                library, ours = torch.nn.functional.linear(few, weight), product(few, weight)
                rows.append(
                    {
                        "model": model,
                        "inner x rows": f"{inner} x {size}",
                        "tokens": count,
                        "library differs": float((library != whole[:count]).float().mean()),
                        "ours differs": float((ours != whole[:count]).float().mean()),
                        "library us": microseconds(lambda few=few, w=weight: torch.nn.functional.linear(few, w)),
                        "ours us": microseconds(lambda few=few, w=weight: product(few, w)),
                    }
                )
    return rows


def decode_us(heads: tuple[int, int, int], batch: int, context: int, count: int) -> float:
    """Of one layer's attention with its keys in ``count`` pieces, the schedule made ahead as vLLM makes it."""
    from vllm.v1.attention.backends.fa_utils import (
        flash_attn_varlen_func,
        get_flash_attn_version,
        get_scheduler_metadata,
    )

    query, kv, dim = heads
    pages = -(-context // PAGE)
    q, keys, values = draw(batch, query, dim), *(draw(batch * pages, PAGE, kv, dim) for _ in range(2))
    table = torch.arange(batch * pages, dtype=torch.int32, device="cuda").view(batch, pages)
    used = torch.full((batch,), context, dtype=torch.int32, device="cuda")
    starts = torch.arange(batch + 1, dtype=torch.int32, device="cuda")
    schedule = get_scheduler_metadata(
        batch_size=batch, max_seqlen_q=1, max_seqlen_k=context, num_heads_q=query, num_heads_kv=kv, headdim=dim,
        cache_seqlens=used, qkv_dtype=torch.bfloat16, cu_seqlens_q=starts, page_size=PAGE, causal=True,
        window_size=(-1, -1), num_splits=count,
    )  # fmt: skip

    def attend() -> None:
        flash_attn_varlen_func(
            q, keys, values, cu_seqlens_q=starts, seqused_k=used, max_seqlen_q=1, max_seqlen_k=context, causal=True,
            block_table=table, num_splits=count, scheduler_metadata=schedule,
            fa_version=get_flash_attn_version(head_size=dim),
        )  # fmt: skip

    return microseconds(attend)


def pieces() -> list[dict[str, Any]]:
    """32 is what vLLM records its graphs with."""
    return [
        {
            "heads": heads,
            "batch x context": (batch, context),
            "up to 32 us": decode_us(heads, batch, context, 32),
            "1 us": decode_us(heads, batch, context, 1),
            "floor us": round(batch * context * heads[1] * heads[2] * 4 / 3e6, 1),
        }
        for heads in HEADS
        for batch, context in BATCHES
    ]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    figures = {"products": products(), "pieces": pieces()}
    for rows in figures.values():
        print(report.table(rows), flush=True)
    report.write(args.out / "invariance.json", figures)


if __name__ == "__main__":
    main()
