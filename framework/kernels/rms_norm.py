"""The forward pass of a root-mean-square norm (Zhang & Sennrich 2019), alone or behind a residual sum.

One program per row and one order of summation, whatever the number of rows: what the trainer computes in one piece is
what the engine computes token by token. Sums in float32, one rounding at the end; the residual sum is rounded first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _forward(x_ptr, r_ptr, w_ptr, y_ptr, s_ptr, n, eps, RESIDUAL: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    row = tl.program_id(0).to(tl.int64) * n
    column = tl.arange(0, BLOCK)
    inside = column < n
    x = tl.load(x_ptr + row + column, mask=inside, other=0.0).to(tl.float32)
    if RESIDUAL:
        x += tl.load(r_ptr + row + column, mask=inside, other=0.0).to(tl.float32)
        rounded = x.to(s_ptr.dtype.element_ty)
        tl.store(s_ptr + row + column, rounded, mask=inside)
        x = rounded.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x) / n + eps)
    w = tl.load(w_ptr + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + row + column, x * rstd * w, mask=inside)


def warps(block: int) -> int:
    """Of a program that works on ``block`` elements."""
    return min(max(block // 512, 1), 16)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``[..., n] -> [..., n]`` contiguous."""
    x = x.contiguous()
    n = x.shape[-1]
    y = torch.empty_like(x)
    block = triton.next_power_of_2(n)
    _forward[(x.numel() // n,)](x, x, weight, y, y, n, eps, RESIDUAL=False, BLOCK=block, num_warps=warps(block))
    return y


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The norm of ``x + residual``, and that sum; both ``[..., n]`` contiguous."""
    x, residual = x.contiguous(), residual.contiguous()
    n = x.shape[-1]
    y, total = torch.empty_like(x), torch.empty_like(x)
    block = triton.next_power_of_2(n)
    _forward[(x.numel() // n,)](
        x, residual, weight, y, total, n, eps, RESIDUAL=True, BLOCK=block, num_warps=warps(block)
    )
    return y, total
