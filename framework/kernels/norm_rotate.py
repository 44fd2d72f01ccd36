"""The forward pass between the query/key/value product and attention: norms of the heads of q and k, and rotation.

One program per token and :data:`HEADS` heads, so that the token's angles are read once for them; a head's sum of
squares has one order of summation, whatever the batch. A norm and a rotation are rounded once each, at their end.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

HEADS = 8
"""Of one program."""


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    x_ptr, qw_ptr, kw_ptr, cos_ptr, sin_ptr, angle_stride, position_ptr, q_ptr, k_ptr, v_ptr, eps,
    QUERY: tl.constexpr, KV: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr,  # noqa: N803
    NORM: tl.constexpr, BY_POSITION: tl.constexpr, VALUES: tl.constexpr,  # noqa: N803
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    column = tl.arange(0, HALF)
    width = column < DIM // 2
    is_q, is_k = head < QUERY, (head >= QUERY) & (head < QUERY + KV)
    is_v = (head >= QUERY + KV) & (head < QUERY + 2 * KV)
    read = is_q | is_k
    if VALUES:
        read = read | is_v
    source = x_ptr + token * (QUERY + 2 * KV) * DIM + (head * DIM)[:, None] + column[None, :]
    raw1 = tl.load(source, mask=read[:, None] & width[None, :], other=0.0)
    raw2 = tl.load(source + DIM // 2, mask=read[:, None] & width[None, :], other=0.0)
    x1, x2 = raw1.to(tl.float32), raw2.to(tl.float32)
    if NORM:
        rstd = tl.rsqrt((tl.sum(x1 * x1, axis=1) + tl.sum(x2 * x2, axis=1)) / DIM + eps)[:, None]
        qw1 = tl.load(qw_ptr + column, mask=width, other=0.0).to(tl.float32)[None, :]
        qw2 = tl.load(qw_ptr + DIM // 2 + column, mask=width, other=0.0).to(tl.float32)[None, :]
        kw1 = tl.load(kw_ptr + column, mask=width, other=0.0).to(tl.float32)[None, :]
        kw2 = tl.load(kw_ptr + DIM // 2 + column, mask=width, other=0.0).to(tl.float32)[None, :]
        x1 = (x1 * rstd * tl.where(is_q[:, None], qw1, kw1)).to(raw1.dtype).to(tl.float32)
        x2 = (x2 * rstd * tl.where(is_q[:, None], qw2, kw2)).to(raw1.dtype).to(tl.float32)
    row = token
    if BY_POSITION:
        row = tl.load(position_ptr + token).to(tl.int64)
    cos = tl.load(cos_ptr + row * angle_stride + column, mask=width, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + row * angle_stride + column, mask=width, other=0.0).to(tl.float32)[None, :]
    y1 = (x1 * cos - x2 * sin).to(raw1.dtype)
    y2 = (x2 * cos + x1 * sin).to(raw1.dtype)
    place = q_ptr + token * QUERY * DIM + (head * DIM)[:, None] + column[None, :]
    tl.store(place, y1, mask=is_q[:, None] & width[None, :])
    tl.store(place + DIM // 2, y2, mask=is_q[:, None] & width[None, :])
    place = k_ptr + token * KV * DIM + ((head - QUERY) * DIM)[:, None] + column[None, :]
    tl.store(place, y1, mask=is_k[:, None] & width[None, :])
    tl.store(place + DIM // 2, y2, mask=is_k[:, None] & width[None, :])
    if VALUES:
        place = v_ptr + token * KV * DIM + ((head - QUERY - KV) * DIM)[:, None] + column[None, :]
        tl.store(place, raw1, mask=is_v[:, None] & width[None, :])
        tl.store(place + DIM // 2, raw2, mask=is_v[:, None] & width[None, :])


def shape(query: int, kv: int, dim: int) -> dict[str, Any]:
    """The constants of a kernel over these heads."""
    half = max(16, triton.next_power_of_2(dim // 2))
    return {"QUERY": query, "KV": kv, "DIM": dim, "HALF": half, "HEADS": HEADS, "num_warps": 2}


def split_norm_rotate(
    qkv: Tensor, weights: tuple[Tensor, Tensor] | None, cos: Tensor, sin: Tensor, *, query: int, kv: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The trainer's call: q, k and v apart.

    Args:
        qkv: ``[T, (query + 2 kv) * dim]``, contiguous.
        weights: of the norms of q and k, ``[dim]`` each; None where the model has none.
        cos: ``[T, dim / 2]`` of each token, columns next to each other.
        sin: like ``cos``, with its stride.
        query: heads.
        kv: heads.
        eps: of the norms.

    Returns:
        ``[T, query, dim]``, ``[T, kv, dim]`` twice; contiguous.
    """
    tokens, dim = len(qkv), qkv.shape[1] // (query + 2 * kv)
    q = qkv.new_empty(tokens, query, dim)
    k, v = qkv.new_empty(2, tokens, kv, dim).unbind(0)
    qw, kw = weights or (qkv, qkv)  # never read without a norm
    _forward[(tokens, triton.cdiv(query + 2 * kv, HEADS))](
        qkv, qw, kw, cos, sin, cos.stride(0), qkv, q, k, v, eps,
        NORM=weights is not None, BY_POSITION=False, VALUES=True, **shape(query, kv, dim),
    )  # fmt: skip
    return q, k, v


def norm_rotate(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, positions: Tensor, table: Tensor, query: int, kv: int, eps: float
) -> tuple[Tensor, Tensor]:
    """The engine's call: q and k, with the angles from its table; the values stay where they are.

    Args:
        qkv: ``[T, (query + 2 kv) * dim]``, contiguous.
        q_weight: ``[dim]``.
        k_weight: ``[dim]``.
        positions: ``[T]`` int64.
        table: ``[positions, dim]``: cosines, then sines, of each position.
        query: heads.
        kv: heads.
        eps: of the norms.

    Returns:
        ``[T, query * dim]`` and ``[T, kv * dim]``, contiguous.
    """
    tokens, dim = len(qkv), table.shape[1]
    q, k = qkv.new_empty(tokens, query * dim), qkv.new_empty(tokens, kv * dim)
    _forward[(tokens, triton.cdiv(query + kv, HEADS))](
        qkv, q_weight, k_weight, table, table[:, dim // 2 :], table.stride(0), positions, q, k, k, eps,
        NORM=True, BY_POSITION=True, VALUES=False, **shape(query, kv, dim),
    )  # fmt: skip
    return q, k


def norm_rotate_shapes(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, positions: Tensor, table: Tensor, query: int, kv: int, eps: float
) -> tuple[Tensor, Tensor]:
    """What :func:`norm_rotate` returns, without its values: for tracing."""
    tokens, dim = qkv.shape[0], table.shape[1]
    return qkv.new_empty(tokens, query * dim), qkv.new_empty(tokens, kv * dim)
