"""Triton kernels behind :class:`Pointwise`: each reads its inputs once and writes its outputs once.

Imported only where the device compiles them. They round where the engine's kernels do (vllm 0.26.0): a norm and a
rotation once, at their end; silu(gate) also before the product with up.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from framework.kernels.rms_norm import rms_norm, warps
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
def _norm_rotate_forward(  # type: ignore[no-untyped-def]
    x_ptr, qw_ptr, kw_ptr, cos_ptr, sin_ptr, q_ptr, k_ptr, v_ptr, eps,
    QUERY: tl.constexpr, KV: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr,  # noqa: N803
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    column = tl.arange(0, HALF)
    inside = column < DIM // 2
    source = x_ptr + (token * (QUERY + 2 * KV) + head) * DIM + column
    raw1 = tl.load(source, mask=inside, other=0.0)
    raw2 = tl.load(source + DIM // 2, mask=inside, other=0.0)
    if head >= QUERY + KV:
        target = v_ptr + (token * KV + head - QUERY - KV) * DIM + column
        tl.store(target, raw1, mask=inside)
        tl.store(target + DIM // 2, raw2, mask=inside)
    else:
        x1, x2 = raw1.to(tl.float32), raw2.to(tl.float32)
        if NORM:
            rstd = tl.rsqrt((tl.sum(x1 * x1) + tl.sum(x2 * x2)) / DIM + eps)
            w_ptr = qw_ptr if head < QUERY else kw_ptr
            w1 = tl.load(w_ptr + column, mask=inside, other=0.0).to(tl.float32)
            w2 = tl.load(w_ptr + DIM // 2 + column, mask=inside, other=0.0).to(tl.float32)
            x1 = (x1 * rstd * w1).to(raw1.dtype).to(tl.float32)
            x2 = (x2 * rstd * w2).to(raw1.dtype).to(tl.float32)
        cos = tl.load(cos_ptr + token * DIM + column, mask=inside, other=0.0).to(tl.float32)
        sin = tl.load(sin_ptr + token * DIM + DIM // 2 + column, mask=inside, other=0.0).to(tl.float32)
        y1 = x1 * cos - x2 * sin
        y2 = x2 * cos + x1 * sin
        if head < QUERY:
            target = q_ptr + (token * QUERY + head) * DIM + column
        else:
            target = k_ptr + (token * KV + head - QUERY) * DIM + column
        tl.store(target, y1, mask=inside)
        tl.store(target + DIM // 2, y2, mask=inside)


@triton.jit
def _norm_rotate_backward(  # type: ignore[no-untyped-def]
    x_ptr, qw_ptr, kw_ptr, cos_ptr, sin_ptr, dq_ptr, dk_ptr, dv_ptr, dx_ptr, eps,
    QUERY: tl.constexpr, KV: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr,  # noqa: N803
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    column = tl.arange(0, HALF)
    inside = column < DIM // 2
    place = (token * (QUERY + 2 * KV) + head) * DIM + column
    if head >= QUERY + KV:
        source = dv_ptr + (token * KV + head - QUERY - KV) * DIM + column
        g1 = tl.load(source, mask=inside, other=0.0).to(tl.float32)
        g2 = tl.load(source + DIM // 2, mask=inside, other=0.0).to(tl.float32)
    else:
        if head < QUERY:
            source = dq_ptr + (token * QUERY + head) * DIM + column
        else:
            source = dk_ptr + (token * KV + head - QUERY) * DIM + column
        d1 = tl.load(source, mask=inside, other=0.0).to(tl.float32)
        d2 = tl.load(source + DIM // 2, mask=inside, other=0.0).to(tl.float32)
        cos = tl.load(cos_ptr + token * DIM + column, mask=inside, other=0.0).to(tl.float32)
        sin = tl.load(sin_ptr + token * DIM + DIM // 2 + column, mask=inside, other=0.0).to(tl.float32)
        g1 = d1 * cos + d2 * sin
        g2 = d2 * cos - d1 * sin
        if NORM:
            x1 = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
            x2 = tl.load(x_ptr + place + DIM // 2, mask=inside, other=0.0).to(tl.float32)
            rstd = tl.rsqrt((tl.sum(x1 * x1) + tl.sum(x2 * x2)) / DIM + eps)
            w_ptr = qw_ptr if head < QUERY else kw_ptr
            g1 *= tl.load(w_ptr + column, mask=inside, other=0.0).to(tl.float32)
            g2 *= tl.load(w_ptr + DIM // 2 + column, mask=inside, other=0.0).to(tl.float32)
            x1, x2 = x1 * rstd, x2 * rstd
            mean = (tl.sum(x1 * g1) + tl.sum(x2 * g2)) / DIM
            g1, g2 = (g1 - x1 * mean) * rstd, (g2 - x2 * mean) * rstd
    tl.store(dx_ptr + place, g1, mask=inside)
    tl.store(dx_ptr + place + DIM // 2, g2, mask=inside)


class _NormRotate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, heads: Heads, norm: bool
    ) -> tuple[Tensor, ...]:
        qkv = qkv.contiguous()
        tokens = len(qkv)
        q = qkv.new_empty(tokens, heads.query, heads.dim)
        k, v = qkv.new_empty(2, tokens, heads.kv, heads.dim).unbind(0)
        _norm_rotate_forward[(tokens, heads.query + 2 * heads.kv)](
            qkv, q_weight, k_weight, cos, sin, q, k, v, heads.eps, **_shape(heads, norm)
        )
        ctx.save_for_backward(qkv, q_weight, k_weight, cos, sin)
        ctx.heads, ctx.norm = heads, norm
        return q, k, v

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        qkv, q_weight, k_weight, cos, sin = ctx.saved_tensors
        dq, dk, dv = (grad.contiguous() for grad in grads)
        heads: Heads = ctx.heads
        dx = torch.empty_like(qkv)
        _norm_rotate_backward[(len(qkv), heads.query + 2 * heads.kv)](
            qkv, q_weight, k_weight, cos, sin, dq, dk, dv, dx, heads.eps, **_shape(heads, ctx.norm)
        )
        if not (ctx.norm and ctx.needs_input_grad[1]):
            return dx, None, None, None, None, None, None
        q, k, _ = qkv.unflatten(1, (-1, heads.dim)).split([heads.query, heads.kv, heads.kv], dim=1)
        weight_gradients = (
            _norm_weight_gradient(x, turn(dy.float(), cos.float(), sin.float(), sign=-1.0), weight, heads.eps)
            for x, dy, weight in ((q, dq, q_weight), (k, dk, k_weight))
        )
        return dx, *weight_gradients, None, None, None, None


def _shape(heads: Heads, norm: bool) -> dict[str, Any]:
    half = triton.next_power_of_2(heads.dim // 2)
    return {"QUERY": heads.query, "KV": heads.kv, "DIM": heads.dim, "HALF": half, "NORM": norm, "num_warps": 1}


def norm_and_rotate(
    qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor, sin: Tensor, heads: Heads
) -> tuple[Tensor, ...]:
    """See :attr:`Pointwise.norm_and_rotate`."""
    norm = q_weight is not None and k_weight is not None
    weights = (q_weight, k_weight) if norm else (qkv, qkv)  # never read without a norm
    return _NormRotate.apply(qkv, *weights, cos, sin, heads, norm)


@triton.jit
def _vocab_stats(  # type: ignore[no-untyped-def]
    z_ptr, target_ptr, top_ptr, total_ptr, weighted_ptr, picked_ptr, rows, inverse_temperature,
    BLOCK: tl.constexpr,  # noqa: N803
):  # fmt: skip
    position = tl.program_id(0)
    row = z_ptr + position.to(tl.int64) * rows
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    weighted = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, rows, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < rows
        z = tl.load(row + column, mask=inside, other=0.0).to(tl.float32) * inverse_temperature
        higher = tl.where(inside, tl.maximum(top, z), top)
        old = tl.where(top == higher, 1.0, tl.exp(top - higher))
        new = tl.where(inside, tl.exp(z - higher), 0.0)
        total = total * old + new
        weighted = weighted * old + new * z
        top = higher
    best = tl.max(top)
    factor = tl.exp(top - best)
    tl.store(top_ptr + position, best)
    tl.store(total_ptr + position, tl.sum(total * factor))
    tl.store(weighted_ptr + position, tl.sum(weighted * factor))
    target = tl.load(target_ptr + position)
    mine = (target >= 0) & (target < rows)
    z = tl.load(row + tl.where(mine, target, 0)).to(tl.float32) * inverse_temperature
    tl.store(picked_ptr + position, tl.where(mine, z, 0.0))


def vocab_stats(logits: Tensor, targets: Tensor, temperature: float) -> VocabStats:
    """See :attr:`Pointwise.vocab_stats`."""
    logits = logits.contiguous()
    n, rows = logits.shape
    out = torch.empty(4, n, dtype=torch.float32, device=logits.device)
    _vocab_stats[(n,)](logits, targets, *out.unbind(0), rows, 1.0 / temperature, BLOCK=2048, num_warps=8)
    return VocabStats(top=out[0], total=out[1], weighted=out[2], picked=out[3])


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


KERNELS = Pointwise(
    rms_norm=_RmsNorm.apply,
    swiglu=_Swiglu.apply,
    norm_and_rotate=norm_and_rotate,
    logits=logits_in_float32,
    add_delta=add_delta,
    vocab_stats=vocab_stats,
    vocab_gradient=vocab_gradient,
    chunk_bytes=320 * 2**20,
)
