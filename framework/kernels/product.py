"""A product whose rows do not depend on how many there are: x W^T with one order of summation.

A library's product sums along the inner dimension from its beginning to its end, whatever the tile (measured on an H100
with cuBLAS 13: bit for bit the sums made here), unless too few tiles would keep the device busy; then it cuts the inner
dimension into pieces and adds theirs. So small results are made here, and large ones by the library. Where the sums
are wanted as they are, unrounded, the library's were not always these; those are all made here.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LARGE = 2**22
"""Elements of a result from which on the library is asked: 256 of its tiles, about two for each multiprocessor."""


@triton.jit
def _product(  # type: ignore[no-untyped-def]
    x_ptr, w_ptr, y_ptr, tokens, size, inner,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,  # noqa: N803
):  # fmt: skip
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    x_ptr += row.to(tl.int64)[:, None] * inner + k[None, :]
    w_ptr += column.to(tl.int64)[None, :] * inner + k[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, inner, BLOCK_K):
        rest = k < inner - start
        x = tl.load(x_ptr + start, mask=(row < tokens)[:, None] & rest[None, :], other=0.0)
        w = tl.load(w_ptr + start, mask=(column < size)[None, :] & rest[:, None], other=0.0)
        total = tl.dot(x, w, total)
    place = y_ptr + row.to(tl.int64)[:, None] * size + column[None, :]
    tl.store(place, total.to(y_ptr.dtype.element_ty), mask=(row < tokens)[:, None] & (column < size)[None, :])


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None, out_dtype: torch.dtype | None = None) -> Tensor:
    """x W^T, rounded, and then the bias.

    Args:
        x: ``[T, in]`` bfloat16 or float16.
        weight: ``[out, in]`` contiguous, of the same dtype.
        bias: ``[out]``.
        out_dtype: float32 for the sums as they are; None rounds them to the inputs' dtype.

    Returns:
        ``[T, out]`` contiguous; row t depends on row t of x alone.
    """
    tokens, (size, inner) = len(x), weight.shape
    aligned = size % 8 == 0 and inner % 8 == 0  # else the library has other kernels
    if tokens * size >= LARGE and aligned and out_dtype is None:
        y = torch.nn.functional.linear(x, weight)
    else:
        x, y = x.contiguous(), x.new_empty(tokens, size, dtype=out_dtype)
        tile = _tile(tokens, size)
        grid = (triton.cdiv(size, tile["BLOCK_N"]), triton.cdiv(tokens, tile["BLOCK_M"]))
        _product[grid](x, weight, y, tokens, size, inner, **tile)
    return y if bias is None else y + bias


def _tile(tokens: int, size: int) -> dict[str, int]:
    """Of no influence on the sums: each is of steps of 16 along the inner dimension."""
    if tokens * size >= LARGE:
        return {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}
    return {"BLOCK_M": 64, "BLOCK_N": 32 if size <= 4096 else 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": 4}
