"""What a row of logits gives in one reading: its softmax's denominator and entropy, a token's logit and rank.

One order of summation for a row, whoever computes it and however many rows there are: the logprob that the engine
reports of a token it sampled has the bits of the one the trainer computes from the same logits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

SHAPE = {"BLOCK": 8192, "num_warps": 16}
"""Part of the order of summation."""


@triton.jit
def _row(row_ptr, rows, temperature, least, TEMPERED: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """max z, sum exp(z - max), sum exp(z - max) z, and how many z are at least ``least``; z = logits / temperature."""
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    weighted = tl.zeros((BLOCK,), tl.float32)
    above = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, rows, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < rows
        z = tl.load(row_ptr + column, mask=inside, other=0.0).to(tl.float32)
        if TEMPERED:
            z = z / temperature
        higher = tl.where(inside, tl.maximum(top, z), top)
        old = tl.where(top == higher, 1.0, tl.exp(top - higher))
        new = tl.where(inside, tl.exp(z - higher), 0.0)
        total = total * old + new
        weighted = weighted * old + new * z
        above += (inside & (z >= least)).to(tl.int32)
        top = higher
    best = tl.max(top)
    factor = tl.exp(top - best)
    return best, tl.sum(total * factor), tl.sum(weighted * factor), tl.sum(above)


@triton.jit
def _statistics(  # type: ignore[no-untyped-def]
    z_ptr, target_ptr, top_ptr, total_ptr, weighted_ptr, picked_ptr, rows, temperature,
    TEMPERED: tl.constexpr, BLOCK: tl.constexpr,  # noqa: N803
):  # fmt: skip
    position = tl.program_id(0)
    row_ptr = z_ptr + position.to(tl.int64) * rows
    top, total, weighted, _ = _row(row_ptr, rows, temperature, 0.0, TEMPERED, BLOCK)
    tl.store(top_ptr + position, top)
    tl.store(total_ptr + position, total)
    tl.store(weighted_ptr + position, weighted)
    target = tl.load(target_ptr + position)
    mine = (target >= 0) & (target < rows)
    z = tl.load(row_ptr + tl.where(mine, target, 0)).to(tl.float32)
    if TEMPERED:
        z = z / temperature
    tl.store(picked_ptr + position, tl.where(mine, z, 0.0))


def statistics(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Of each row's z = logits / temperature: max, sum of exp(z - max), sum of exp(z - max) z, and z of its target.

    Args:
        logits: ``[n, rows]``, contiguous.
        targets: ``[n]`` int64; one outside the rows gives 0.
        temperature: > 0.

    Returns:
        ``[4, n]`` float32.
    """
    n, rows = logits.shape
    out = torch.empty(4, n, dtype=torch.float32, device=logits.device)
    _statistics[(n,)](logits, targets, *out.unbind(0), rows, temperature, TEMPERED=temperature != 1.0, **SHAPE)
    return out


@triton.jit
def _chosen(logit_ptr, stride, token_ptr, logprob_ptr, rank_ptr, rows, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    position = tl.program_id(0)
    row_ptr = logit_ptr + position.to(tl.int64) * stride
    z = tl.load(row_ptr + tl.load(token_ptr + position)).to(tl.float32)
    top, total, _, above = _row(row_ptr, rows, 1.0, z, False, BLOCK)
    # The logarithm of torch, in which the trainer puts its ranks' sums together.
    tl.store(logprob_ptr + position, z - (top + libdevice.log(total)))
    tl.store(rank_ptr + position, above.to(tl.int64))


def token_logprobs(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Logprob and rank of one token of each row.

    Args:
        logits: ``[n, rows]``, columns next to each other.
        tokens: ``[n]`` int64.

    Returns:
        ``[n]`` float32, and ``[n]`` int64: how many logits are at least the token's, itself among them.
    """
    n, rows = logits.shape
    logprobs = torch.empty(n, dtype=torch.float32, device=logits.device)
    ranks = torch.empty(n, dtype=torch.int64, device=logits.device)
    _chosen[(n,)](logits, logits.stride(0), tokens, logprobs, ranks, rows, **SHAPE)
    return logprobs, ranks
