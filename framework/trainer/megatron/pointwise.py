"""What a layer computes: products, and between them norms, rotation, SwiGLU, and the softmax over the vocabulary.

Implementations of one record of functions: plain torch here, kernels in ``kernels.py`` where the device has a kernel
compiler. The plain ones are the definition; the kernels round where the engine's kernels round.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    """How the rows of a fused query/key/value product are divided."""

    query: int
    kv: int
    """Key heads; as many value heads."""
    dim: int
    eps: float
    """Of the norms over each head, for models that have them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VocabStats:
    """Of each position over one rank's part of the vocabulary; z are the logits divided by the temperature."""

    top: Tensor
    """``[n]`` float32, max_j z_j."""
    total: Tensor
    """``[n]`` float32, sum_j exp(z_j - top)."""
    weighted: Tensor
    """``[n]`` float32, sum_j exp(z_j - top) z_j."""
    picked: Tensor
    """``[n]`` float32, z of the target; 0 where another rank has it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VocabGradient:
    """What d loss / d logits of some positions is made of; all ``[n]`` float32."""

    log_z: Tensor
    entropy: Tensor
    grad_logprobs: Tensor
    grad_entropy: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Pointwise:
    """The functions that a device may have kernels for."""

    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    """(x ``[..., n]``, weight ``[n]``, eps)."""
    swiglu: Callable[[Tensor], Tensor]
    """``[T, 2 f]`` (gate, up) to ``[T, f]``."""
    norm_and_rotate: Callable[[Tensor, Tensor | None, Tensor | None, Tensor, Tensor, Heads], tuple[Tensor, ...]]
    """(qkv ``[T, rows]``, q and k norm weights ``[dim]`` or None, cos and sin ``[T, 1, dim]``, heads) to
    q ``[T, query, dim]``, k and v ``[T, kv, dim]``; sin has its first half negated."""
    product: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    """(x ``[T, in]``, weight ``[out, in]``, bias ``[out]`` or None) to ``[T, out]``, of the layers' linears."""
    logits: Callable[[Tensor, Tensor], Tensor]
    """(hidden ``[n, hidden]``, weight ``[rows, hidden]``) to ``[n, rows]``; float32 where that costs nothing, because a
    bfloat16 logit between 16 and 32 is a multiple of 1/8. The engine's logits must be rounded alike."""
    add_delta: Callable[[Tensor, Tensor, Tensor], None]
    """(y ``[T, rows]``, u ``[T, r]``, b ``[rows, r]``): y += u b^T in place, rounded once."""
    vocab_stats: Callable[[Tensor, Tensor, float], VocabStats]
    """(logits ``[n, rows]``, targets ``[n]`` int64 local row or out of range, temperature)."""
    vocab_gradient: Callable[[Tensor, Tensor, float, VocabGradient, torch.dtype], Tensor]
    """(logits, targets, temperature, parts, dtype) to ``[n, rows]`` of that dtype; may overwrite the logits."""
    chunk_bytes: int
    """Of one chunk's fp32 logits on a rank."""


class _RmsNorm(torch.autograd.Function):
    """y = x r w with r = 1 / sqrt(mean(x^2) + eps), keeping x as it came and r. With g = dy w:

    dx = r g - x r^3 mean(g x),  dw = sum over rows of dy x r
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x32 = x.float()
        r = torch.linalg.vector_norm(x32, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, r)
        return (x32 * r).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, r = ctx.saved_tensors
        x32, g = x.float(), grads[0] * weight.float()
        dw = (grads[0] * x32).mul_(r).flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        inner = (g * x32).sum(dim=-1, keepdim=True).mul_(r**3 / x.shape[-1])
        return g.mul_(r).addcmul_(x32, inner, value=-1.0).to(x.dtype), dw, None


class _SwiGlu(torch.autograd.Function):
    """Keeps its input only."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        out = torch.empty_like(gate_up)
        grad_gate, grad_up = out.chunk(2, dim=-1)
        torch.mul(grads[0], F.silu(gate), out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grads[0] * up, gate, grad_input=grad_gate)
        return out


class _Rotation(torch.autograd.Function):
    """Linear in x; its transpose is the rotation by the opposite angle. Keeps the angles only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return turn(x, cos, sin, sign=1.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return turn(grads[0], cos, sin, sign=-1.0), None, None


def turn(x: Tensor, cos: Tensor, sin: Tensor, *, sign: float) -> Tensor:
    """Rotates by the plan's angles, or with ``sign=-1`` back."""
    half = x.shape[-1] // 2
    out = x * cos
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=sign)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:], value=sign)
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm (Zhang & Sennrich 2019), statistics in float32."""
    return _RmsNorm.apply(x, weight, eps)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer 2020)."""
    return _SwiGlu.apply(gate_up)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding (Su et al. 2021) in the half-split form HF uses; ``sin`` has its first half negated."""
    return _Rotation.apply(x, cos, sin)


def norm_and_rotate(
    qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor, sin: Tensor, heads: Heads
) -> tuple[Tensor, ...]:
    """Splits the fused product, normalises q and k where the model does, and rotates them."""
    q, k, v = qkv.unflatten(1, (-1, heads.dim)).split([heads.query, heads.kv, heads.kv], dim=1)
    if q_weight is not None and k_weight is not None:
        q, k = rms_norm(q, q_weight, heads.eps), rms_norm(k, k_weight, heads.eps)
    return rotate(q, cos, sin), rotate(k, cos, sin), v


def add_delta(y: Tensor, u: Tensor, b: Tensor) -> None:
    """See :attr:`Pointwise.add_delta`."""
    y.addmm_(u, b.t())


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    z = logits.to(torch.float32, copy=True)
    return z if temperature == 1.0 else z.div_(temperature)


def vocab_stats(logits: Tensor, targets: Tensor, temperature: float) -> VocabStats:
    """See :attr:`Pointwise.vocab_stats`."""
    z = _scaled(logits, temperature)
    mine = (targets >= 0) & (targets < z.shape[1])
    picked = z.gather(1, targets.clamp(0, z.shape[1] - 1)[:, None]).squeeze(1) * mine
    top = z.amax(dim=1)
    p = z.softmax(dim=1)  # one fused pass; its largest entry is 1 / sum_j exp(z_j - top)
    total = p.amax(dim=1).reciprocal()
    return VocabStats(top=top, total=total, weighted=z.mul_(p).sum(dim=1) * total, picked=picked)


def vocab_gradient(
    logits: Tensor, targets: Tensor, temperature: float, parts: VocabGradient, dtype: torch.dtype
) -> Tensor:
    """See :attr:`Pointwise.vocab_gradient`."""
    log_p = _scaled(logits, temperature).sub_(parts.log_z[:, None])
    if parts.grad_entropy.any():
        scale = (log_p + parts.entropy[:, None]).mul_(parts.grad_entropy[:, None]).add_(parts.grad_logprobs[:, None])
        grad = log_p.exp_().mul_(scale).neg_()
    else:
        grad = log_p.exp_().mul_(-parts.grad_logprobs[:, None])
    rows = torch.nonzero((targets >= 0) & (targets < grad.shape[1])).squeeze(1)
    grad[rows, targets[rows]] += parts.grad_logprobs[rows]
    return (grad if temperature == 1.0 else grad.div_(temperature)).to(dtype)


PLAIN = Pointwise(
    rms_norm=rms_norm,
    swiglu=swiglu,
    norm_and_rotate=norm_and_rotate,
    product=F.linear,
    logits=lambda hidden, weight: hidden @ weight.t(),
    add_delta=add_delta,
    vocab_stats=vocab_stats,
    vocab_gradient=vocab_gradient,
    chunk_bytes=24 * 2**20,  # stays in the cache, and below the size that malloc takes from the kernel each time
)
