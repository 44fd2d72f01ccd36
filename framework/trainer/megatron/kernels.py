"""Triton kernels behind :class:`Pointwise`: each reads its inputs once and writes its outputs once.

Imported only where the device compiles them. They round where the engine's kernels do (vllm 0.26.0): a norm and a
rotation once, at their end; silu(gate) also before the product with up.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from framework.kernels import norm_rotate
from framework.kernels.norm_rotate import split_norm_rotate
from framework.kernels.product import product
from framework.kernels.rms_norm import rms_norm, warps
from framework.kernels.vocabulary import row_statistics
from framework.trainer.megatron.pointwise import Heads, Pointwise, VocabGradient, VocabStats, turn


@triton.jit
def _rms_norm_backward(x_ptr, w_ptr, dy_ptr, dx_ptr, n, eps, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    row = tl.program_id(0).to(tl.int64) * n
    column = tl.arange(0, BLOCK)
    inside = column < n
    x = tl.load(x_ptr + row + column, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + column, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(dy_ptr + row + column, mask=inside, other=0.0).to(tl.float32) * w
    rstd = tl.rsqrt(tl.sum(x * x) / n + eps)
    xhat = x * rstd
    dx = (g - xhat * (tl.sum(xhat * g) / n)) * rstd
    tl.store(dx_ptr + row + column, dx, mask=inside)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return rms_norm(x, weight, eps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dy = grads[0].contiguous()
        n = x.shape[-1]
        dx = torch.empty_like(x)
        block = triton.next_power_of_2(n)
        _rms_norm_backward[(x.numel() // n,)](x, weight, dy, dx, n, ctx.eps, BLOCK=block, num_warps=warps(block))
        return dx, _norm_weight_gradient(x, dy, weight, ctx.eps) if ctx.needs_input_grad[1] else None, None


def _norm_weight_gradient(x: Tensor, dy: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``[n]``: the sum over rows of dy times the normalised x. Plain torch: only training the base model needs it."""
    x32 = x.float()
    rstd = x32.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    return (dy * x32).mul_(rstd).flatten(0, -2).sum(0).to(weight.dtype)


@triton.jit
def _swiglu_forward(x_ptr, y_ptr, f, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < f
    raw = tl.load(x_ptr + row * 2 * f + column, mask=inside, other=0.0)
    gate = raw.to(tl.float32)
    up = tl.load(x_ptr + row * 2 * f + f + column, mask=inside, other=0.0).to(tl.float32)
    silu = (gate * tl.sigmoid(gate)).to(raw.dtype).to(tl.float32)
    tl.store(y_ptr + row * f + column, silu * up, mask=inside)


@triton.jit
def _swiglu_backward(x_ptr, dy_ptr, dx_ptr, f, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < f
    raw = tl.load(x_ptr + row * 2 * f + column, mask=inside, other=0.0)
    gate = raw.to(tl.float32)
    up = tl.load(x_ptr + row * 2 * f + f + column, mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + row * f + column, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = (gate * sigmoid).to(raw.dtype).to(tl.float32)
    dgate = dy * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    tl.store(dx_ptr + row * 2 * f + column, dgate, mask=inside)
    tl.store(dx_ptr + row * 2 * f + f + column, dy * silu, mask=inside)


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        gate_up = gate_up.contiguous()
        rows, f = gate_up.shape[0], gate_up.shape[1] // 2
        y = gate_up.new_empty(rows, f)
        _swiglu_forward[(rows, triton.cdiv(f, 1024))](gate_up, y, f, BLOCK=1024, num_warps=4)
        ctx.save_for_backward(gate_up)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gate_up,) = ctx.saved_tensors
        dy = grads[0].contiguous()
        rows, f = dy.shape
        dx = torch.empty_like(gate_up)
        _swiglu_backward[(rows, triton.cdiv(f, 1024))](gate_up, dy, dx, f, BLOCK=1024, num_warps=4)
        return (dx,)


@triton.jit
def _norm_rotate_backward(  # type: ignore[no-untyped-def]
    x_ptr, qw_ptr, kw_ptr, cos_ptr, sin_ptr, angle_stride, dq_ptr, dk_ptr, dv_ptr, dx_ptr, eps,
    QUERY: tl.constexpr, KV: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr,  # noqa: N803
    NORM: tl.constexpr,  # noqa: N803
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    column = tl.arange(0, HALF)
    width = (column < DIM // 2)[None, :]
    is_q, is_k = (head < QUERY)[:, None], ((head >= QUERY) & (head < QUERY + KV))[:, None]
    is_v = ((head >= QUERY + KV) & (head < QUERY + 2 * KV))[:, None]
    place = token * (QUERY + 2 * KV) * DIM + (head * DIM)[:, None] + column[None, :]
    from_q = dq_ptr + token * QUERY * DIM + (head * DIM)[:, None] + column[None, :]
    from_k = dk_ptr + token * KV * DIM + ((head - QUERY) * DIM)[:, None] + column[None, :]
    from_v = dv_ptr + token * KV * DIM + ((head - QUERY - KV) * DIM)[:, None] + column[None, :]
    d1 = tl.load(from_q, mask=is_q & width, other=0.0).to(tl.float32)
    d1 += tl.load(from_k, mask=is_k & width, other=0.0).to(tl.float32)
    d2 = tl.load(from_q + DIM // 2, mask=is_q & width, other=0.0).to(tl.float32)
    d2 += tl.load(from_k + DIM // 2, mask=is_k & width, other=0.0).to(tl.float32)
    cos = tl.load(cos_ptr + token * angle_stride + column[None, :], mask=width, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + token * angle_stride + column[None, :], mask=width, other=0.0).to(tl.float32)
    g1 = d1 * cos + d2 * sin
    g2 = d2 * cos - d1 * sin
    if NORM:
        x1 = tl.load(x_ptr + place, mask=(is_q | is_k) & width, other=0.0).to(tl.float32)
        x2 = tl.load(x_ptr + place + DIM // 2, mask=(is_q | is_k) & width, other=0.0).to(tl.float32)
        rstd = tl.rsqrt((tl.sum(x1 * x1, axis=1) + tl.sum(x2 * x2, axis=1)) / DIM + eps)[:, None]
        qw1 = tl.load(qw_ptr + column[None, :], mask=width, other=0.0).to(tl.float32)
        qw2 = tl.load(qw_ptr + DIM // 2 + column[None, :], mask=width, other=0.0).to(tl.float32)
        kw1 = tl.load(kw_ptr + column[None, :], mask=width, other=0.0).to(tl.float32)
        kw2 = tl.load(kw_ptr + DIM // 2 + column[None, :], mask=width, other=0.0).to(tl.float32)
        g1, g2 = g1 * tl.where(is_q, qw1, kw1), g2 * tl.where(is_q, qw2, kw2)
        x1, x2 = x1 * rstd, x2 * rstd
        mean = ((tl.sum(x1 * g1, axis=1) + tl.sum(x2 * g2, axis=1)) / DIM)[:, None]
        g1, g2 = (g1 - x1 * mean) * rstd, (g2 - x2 * mean) * rstd
    g1 += tl.load(from_v, mask=is_v & width, other=0.0).to(tl.float32)
    g2 += tl.load(from_v + DIM // 2, mask=is_v & width, other=0.0).to(tl.float32)
    tl.store(dx_ptr + place, g1, mask=(is_q | is_k | is_v) & width)
    tl.store(dx_ptr + place + DIM // 2, g2, mask=(is_q | is_k | is_v) & width)


class _NormRotate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, heads: Heads, norm: bool
    ) -> tuple[Tensor, ...]:
        qkv = qkv.contiguous()
        weights = (q_weight, k_weight) if norm else None
        q, k, v = split_norm_rotate(qkv, weights, *_angles(cos, sin), query=heads.query, kv=heads.kv, eps=heads.eps)
        ctx.save_for_backward(qkv, q_weight, k_weight, cos, sin)
        ctx.heads, ctx.norm = heads, norm
        return q, k, v

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        qkv, q_weight, k_weight, cos, sin = ctx.saved_tensors
        dq, dk, dv = (grad.contiguous() for grad in grads)
        heads: Heads = ctx.heads
        dx = torch.empty_like(qkv)
        angles = _angles(cos, sin)
        _norm_rotate_backward[(len(qkv), triton.cdiv(heads.query + 2 * heads.kv, norm_rotate.HEADS))](
            qkv, q_weight, k_weight, *angles, angles[0].stride(0), dq, dk, dv, dx, heads.eps,
            NORM=ctx.norm, **norm_rotate.shape(heads.query, heads.kv, heads.dim),
        )  # fmt: skip
        if not (ctx.norm and ctx.needs_input_grad[1]):
            return dx, None, None, None, None, None, None
        q, k, _ = qkv.unflatten(1, (-1, heads.dim)).split([heads.query, heads.kv, heads.kv], dim=1)
        weight_gradients = (
            _norm_weight_gradient(x, turn(dy.float(), cos.float(), sin.float(), sign=-1.0), weight, heads.eps)
            for x, dy, weight in ((q, dq, q_weight), (k, dk, k_weight))
        )
        return dx, *weight_gradients, None, None, None, None


def _angles(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """``[T, dim / 2]`` each, of the plan's ``[T, 1, dim]``, whose sines are negated in the first half."""
    half = cos.shape[-1] // 2
    return cos[:, 0, :half], sin[:, 0, half:]


def norm_and_rotate(
    qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor, sin: Tensor, heads: Heads
) -> tuple[Tensor, ...]:
    """See :attr:`Pointwise.norm_and_rotate`."""
    norm = q_weight is not None and k_weight is not None
    weights = (q_weight, k_weight) if norm else (qkv, qkv)  # never read without a norm
    return _NormRotate.apply(qkv, *weights, cos, sin, heads, norm)


def vocab_stats(logits: Tensor, targets: Tensor, temperature: float) -> VocabStats:
    """See :attr:`Pointwise.vocab_stats`."""
    row = row_statistics(logits.contiguous(), targets, temperature)
    return VocabStats(top=row.top, total=row.total, weighted=row.weighted, picked=row.picked)


@triton.jit
def _vocab_gradient(  # type: ignore[no-untyped-def]
    z_ptr, out_ptr, target_ptr, log_z_ptr, entropy_ptr, grad_logprobs_ptr, grad_entropy_ptr, rows, inverse_temperature,
    BLOCK: tl.constexpr,  # noqa: N803
):  # fmt: skip
    position = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < rows
    place = position.to(tl.int64) * rows + column
    z = tl.load(z_ptr + place, mask=inside, other=0.0).to(tl.float32) * inverse_temperature
    grad_logprobs = tl.load(grad_logprobs_ptr + position)
    grad_entropy = tl.load(grad_entropy_ptr + position)
    log_p = z - tl.load(log_z_ptr + position)
    grad = -tl.exp(log_p) * (grad_logprobs + grad_entropy * (log_p + tl.load(entropy_ptr + position)))
    grad += tl.where(column == tl.load(target_ptr + position), grad_logprobs, 0.0)
    tl.store(out_ptr + place, grad * inverse_temperature, mask=inside)


def vocab_gradient(
    logits: Tensor, targets: Tensor, temperature: float, parts: VocabGradient, dtype: torch.dtype
) -> Tensor:
    """See :attr:`Pointwise.vocab_gradient`; overwrites logits of the same dtype."""
    logits = logits.contiguous()
    out = logits if logits.dtype is dtype else torch.empty_like(logits, dtype=dtype)
    n, rows = logits.shape
    per_position = (parts.log_z, parts.entropy, parts.grad_logprobs, parts.grad_entropy)
    _vocab_gradient[(n, triton.cdiv(rows, 4096))](
        logits, out, targets, *(x.contiguous() for x in per_position), rows, 1.0 / temperature, BLOCK=4096, num_warps=8
    )
    return out


def logits_in_float32(hidden: Tensor, weight: Tensor) -> Tensor:
    """See :attr:`Pointwise.logits`: the product's sums as they are, without rounding them."""
    if hidden.dtype is torch.float32:
        return hidden @ weight.t()
    return torch.mm(hidden, weight.t(), out_dtype=torch.float32)


@triton.jit
def _add_delta(y_ptr, y_stride, u_ptr, u_stride, b_ptr, tokens, size, RANK: tl.constexpr, BLOCK_R: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    row = tl.program_id(0) * 64 + tl.arange(0, 64)
    column = tl.program_id(1) * 64 + tl.arange(0, 64)
    r = tl.arange(0, BLOCK_R)
    inside = (row < tokens)[:, None] & (column < size)[None, :]
    place = y_ptr + row.to(tl.int64)[:, None] * y_stride + column[None, :]
    u_place = u_ptr + row.to(tl.int64)[:, None] * u_stride + r[None, :]
    u = tl.load(u_place, mask=(row < tokens)[:, None] & (r < RANK)[None, :], other=0.0)
    b = tl.load(
        b_ptr + column[None, :] * RANK + r[:, None], mask=(column < size)[None, :] & (r < RANK)[:, None], other=0.0
    )
    total = tl.load(place, mask=inside, other=0.0).to(tl.float32) + tl.dot(u, b)
    tl.store(place, total.to(y_ptr.dtype.element_ty), mask=inside)


def add_delta(y: Tensor, u: Tensor, b: Tensor) -> None:
    """See :attr:`Pointwise.add_delta`; bit for bit what the engine's kernel adds (engine/vllm/fused_lora.py)."""
    rank = b.shape[1]
    if y.dtype is torch.float32:  # tensor cores would round what they multiply
        y.addmm_(u, b.t())
        return
    grid = (triton.cdiv(len(y), 64), triton.cdiv(y.shape[1], 64))
    _add_delta[grid](
        y, y.stride(0), u, u.stride(0), b.contiguous(), len(y), y.shape[1],
        RANK=rank, BLOCK_R=max(16, triton.next_power_of_2(rank)), num_warps=4,
    )  # fmt: skip


class _Product(torch.autograd.Function):
    """The gradients are the library's: nobody compares them bit for bit."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,), (x, weight) = grads, ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return dy @ weight if needs_x else None, dy.t() @ x if needs_weight else None, dy.sum(0) if needs_bias else None


KERNELS = Pointwise(
    rms_norm=_RmsNorm.apply,
    swiglu=_Swiglu.apply,
    norm_and_rotate=norm_and_rotate,
    product=torch.nn.functional.linear,
    logits=logits_in_float32,
    add_delta=add_delta,
    vocab_stats=vocab_stats,
    vocab_gradient=vocab_gradient,
    chunk_bytes=320 * 2**20,
)
EXACT = replace(
    KERNELS,
    product=_Product.apply,
    logits=lambda hidden, weight: product(hidden, weight, out_dtype=torch.float32),
)
"""With ``numerics=exact``: a row's product does not depend on how many rows there are."""
