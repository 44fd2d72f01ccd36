"""What a row of logits gives in one reading: its softmax's denominator and entropy, a token's logit and rank.

One kernel, compiled once, for whoever asks and however many rows there are: a second one of the same lines may fuse a
product and a sum elsewhere. So the logprob that the engine reports of a token it sampled has the bits of the one the
trainer computes from the same logits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 8192, 16
"""Part of the order of summation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowStatistics:
    """Of each row of z = logits / temperature and one column of it; all ``[n]``."""

    top: Tensor
    """float32, max z."""
    total: Tensor
    """float32, sum of exp(z - top)."""
    weighted: Tensor
    """float32, sum of exp(z - top) z."""
    picked: Tensor
    """float32, z of the column; 0 for one outside the row."""
    rank: Tensor
    """int64, how many z are at least that, itself among them."""


@triton.jit(
    do_not_specialize=["stride", "rows", "temperature"],
    do_not_specialize_on_alignment=["column_ptr", "top_ptr", "total_ptr", "weighted_ptr", "picked_ptr", "rank_ptr"],
)
def _statistics(  # type: ignore[no-untyped-def]
    z_ptr, stride, column_ptr, top_ptr, total_ptr, weighted_ptr, picked_ptr, rank_ptr, rows, temperature,
    BLOCK: tl.constexpr,  # noqa: N803
):  # fmt: skip
    position = tl.program_id(0)
    row_ptr = z_ptr + position.to(tl.int64) * stride
    chosen = tl.load(column_ptr + position)
    mine = (chosen >= 0) & (chosen < rows)
    picked = tl.load(row_ptr + tl.where(mine, chosen, 0)).to(tl.float32) / temperature
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    weighted = tl.zeros((BLOCK,), tl.float32)
    above = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, rows, BLOCK):
        column = start + tl.arange(0, BLOCK)
        z = tl.load(row_ptr + column, mask=column < rows, other=0.0).to(tl.float32) / temperature
        inside = (column < rows) & (z != float("-inf"))  # that is what top_k and top_p leave of the others
        z = tl.where(inside, z, 0.0)
        higher = tl.where(inside, tl.maximum(top, z), top)
        old = tl.where(top == higher, 1.0, tl.exp(top - higher))
        new = tl.where(inside, tl.exp(z - higher), 0.0)
        total = total * old + new
        weighted = weighted * old + new * z
        above += (inside & (z >= picked)).to(tl.int32)
        top = higher
    best = tl.max(top)
    factor = tl.exp(top - best)
    tl.store(top_ptr + position, best)
    tl.store(total_ptr + position, tl.sum(total * factor))
    tl.store(weighted_ptr + position, tl.sum(weighted * factor))
    tl.store(picked_ptr + position, tl.where(mine, picked, 0.0))
    tl.store(rank_ptr + position, tl.sum(above).to(tl.int64))


def row_statistics(logits: Tensor, columns: Tensor, temperature: float) -> RowStatistics:
    """Reads each row once.

    Args:
        logits: ``[n, rows]``, columns next to each other; -inf for what cannot be drawn.
        columns: ``[n]`` int64.
        temperature: > 0.
    """
    n, rows = logits.shape
    top, total, weighted, picked = torch.empty(4, n, dtype=torch.float32, device=logits.device).unbind(0)
    rank = torch.empty(n, dtype=torch.int64, device=logits.device)
    _statistics[(n,)](
        logits, logits.stride(0), columns.contiguous(), top, total, weighted, picked, rank, rows, float(temperature),
        BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
    return RowStatistics(top=top, total=total, weighted=weighted, picked=picked, rank=rank)


def token_logprobs(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Logprob and rank of one token of each row, put together as the trainer puts its ranks' parts together.

    Args:
        logits: ``[n, rows]``, columns next to each other, divided by the temperature.
        tokens: ``[n]`` int64.

    Returns:
        ``[n]`` float32, and ``[n]`` int64: how many logits are at least the token's, itself among them.
    """
    row = row_statistics(logits, tokens, 1.0)
    return row.picked - (row.top + row.total.log()), row.rank
