"""Causal attention by plain matrix products over buckets of sequences of similar length, where there is no kernel.

torch's own attention for such devices takes five times as long, forward and backward, on sequences of some hundred
tokens. Scores, softmax and their gradients are float32 and what goes into the other products has the compute dtype, as
in FlashAttention (Dao 2023). The backward pass makes the probabilities again, so that only q, k and v are kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

BUCKET_SCORES = 2**18
"""Attention scores of one bucket and head: few enough for the cache, enough to outweigh the calls."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """S sequences padded on the right to one length L; causality keeps the padding out."""

    gather: Tensor
    """``[S, L]`` int64 token index of each padded position (an arbitrary valid index where there is none)."""
    source: Tensor
    """``[n]`` int64 flat index in ``[S * L]`` of each real token."""
    target: Tensor
    """``[n]`` int64 its token index."""
    padding: Tensor
    """``[S * L - n]`` int64 flat indices of the positions without a token."""

    def take(self, x: Tensor, num_kv_heads: int) -> Tensor:
        """``[T, heads, d] -> [S * kv_heads, G * L, d]``, zero at padding.

        A matrix is a sequence and a key/value head; its rows are the positions of each of the G heads of ``x`` that go
        with it. G is 1 for keys and values.
        """
        num_sequences, length = self.gather.shape
        flat = x[self.gather.flatten()].index_fill_(0, self.padding, 0.0)
        heads = flat.view(num_sequences, length, num_kv_heads, -1, x.shape[-1])
        return heads.permute(0, 2, 3, 1, 4).reshape(num_sequences * num_kv_heads, -1, x.shape[-1])

    def put(self, out: Tensor, matrices: Tensor, num_kv_heads: int) -> None:
        """The inverse of :meth:`take`, into ``out``; what stands at padding is dropped."""
        num_sequences, length = self.gather.shape
        heads = matrices.view(num_sequences, num_kv_heads, -1, length, out.shape[-1])
        flat = heads.permute(0, 3, 1, 2, 4).reshape(num_sequences * length, *out.shape[1:])
        out.index_copy_(0, self.target, flat[self.source])


def make_buckets(offsets: Sequence[int], device: torch.device) -> tuple[Bucket, ...]:
    """Buckets that hold every token once; within one, lengths differ by less than a factor of two.

    Args:
        offsets: ``S + 1`` of the sequences in the token axis.
        device: of the buckets' indices.
    """
    by_length: dict[int, list[tuple[int, int]]] = {}
    for start, stop in pairwise(offsets):
        by_length.setdefault((stop - start - 1).bit_length(), []).append((start, stop - start))
    return tuple(_bucket(members, device) for members in _split(by_length.values()))


def _split(groups: Iterable[list[tuple[int, int]]]) -> Iterator[list[tuple[int, int]]]:
    """Runs of each group's (start, length) with at most :data:`BUCKET_SCORES`, or of one sequence."""
    for members in groups:
        count = max(1, BUCKET_SCORES // max(length for _, length in members) ** 2)
        for first in range(0, len(members), count):
            yield members[first : first + count]


def _bucket(members: Sequence[tuple[int, int]], device: torch.device) -> Bucket:
    width = max(length for _, length in members)
    starts = torch.tensor([start for start, _ in members])[:, None]
    lengths = torch.tensor([length for _, length in members])[:, None]
    column = torch.arange(width)[None]
    gather = starts + column.minimum(lengths - 1)
    real = (column < lengths).flatten()
    source = real.nonzero().flatten()
    return Bucket(
        gather=gather.to(device),
        source=source.to(device),
        target=gather.flatten()[source].to(device),
        padding=(~real).nonzero().flatten().to(device),
    )


class BucketAttention(torch.autograd.Function):
    """(q ``[T, heads, d]``, k and v ``[T, kv_heads, d]``, buckets) to ``[T, heads, d]``."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, buckets: tuple[Bucket, ...]) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.buckets = buckets
        out, num_kv_heads = q.new_empty(q.shape), k.shape[1]
        for bucket in buckets:
            p = _probabilities(bucket.take(q, num_kv_heads), bucket.take(k, num_kv_heads))
            bucket.put(out, p.to(v.dtype) @ bucket.take(v, num_kv_heads), num_kv_heads)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
        num_kv_heads, scale = k.shape[1], q.shape[-1] ** -0.5
        for bucket in ctx.buckets:
            mq, mk, mv, mo = (bucket.take(x, num_kv_heads) for x in (q, k, v, grads[0]))
            p = _probabilities(mq, mk)
            bucket.put(dv, p.to(v.dtype).transpose(1, 2) @ mo, num_kv_heads)
            dp = mo.float() @ mv.float().transpose(1, 2)
            mean = torch.einsum("bij,bij->bi", p, dp)[..., None]
            ds = dp.sub_(mean).mul_(p).mul_(scale).to(q.dtype)
            bucket.put(dq, ds @ mk, num_kv_heads)
            bucket.put(dk, ds.transpose(1, 2) @ mq, num_kv_heads)
        return dq, dk, dv, None


def _probabilities(q: Tensor, k: Tensor) -> Tensor:
    """``[B, G * L, d]`` and ``[B, L, d]`` to ``[B, G * L, L]`` float32."""
    length = k.shape[1]
    future = torch.full((length, length), -math.inf, device=q.device).triu_(1)
    mask = future.repeat(q.shape[1] // length, 1)
    scores = torch.baddbmm(mask, q.float(), k.float().transpose(1, 2), alpha=q.shape[-1] ** -0.5)
    return scores.softmax(dim=-1)
