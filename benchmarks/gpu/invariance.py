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


def pieces() -> list[dict[str, Any]]:
    """32 is what vLLM records its graphs with."""
    from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func, get_flash_attn_version

    rows = []
    for query, kv, dim in HEADS:
        for batch, context in BATCHES:
            pages = -(-context // PAGE)
            keys, values = draw(batch * pages, PAGE, kv, dim), draw(batch * pages, PAGE, kv, dim)
            table = torch.arange(batch * pages, dtype=torch.int32, device="cuda").view(batch, pages)
            used = torch.full((batch,), context, dtype=torch.int32, device="cuda")
            starts, q = torch.arange(batch + 1, dtype=torch.int32, device="cuda"), draw(batch, query, dim)
            times = {
                f"{count} us": microseconds(
                    lambda count=count, q=q, k=keys, v=values, s=starts, u=used, t=table, c=context, d=dim: (
                        flash_attn_varlen_func(
                            q, k, v, cu_seqlens_q=s, seqused_k=u, max_seqlen_q=1, max_seqlen_k=c, causal=True,
                            block_table=t, num_splits=count, fa_version=get_flash_attn_version(head_size=d),
                        )
                    )
                )
                for count in (32, 1)
            }  # fmt: skip
            floor = round(batch * context * kv * dim * 4 / 3e6, 1)
            rows.append({"heads": (query, kv, dim), "batch x context": (batch, context), **times, "floor us": floor})
    return rows


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
