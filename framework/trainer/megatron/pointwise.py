"""What a layer computes between its matrix products: norms, rotation, SwiGLU, and the softmax over the vocabulary.

Two implementations of one record of functions: plain torch here, one kernel per function in ``kernels.py`` where the
device has a kernel compiler. The plain ones are the definition; the kernels round where the engine's kernels round.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

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
    vocab_stats: Callable[[Tensor, Tensor, float], VocabStats]
    """(logits ``[n, rows]`` compute dtype, targets ``[n]`` int64 local row or out of range, temperature)."""
    vocab_gradient: Callable[[Tensor, Tensor, float, VocabGradient], Tensor]
    """(logits, targets, temperature, parts) to ``[n, rows]`` compute dtype; may overwrite the logits."""
    chunk_bytes: int
    """Of one chunk's fp32 logits on a rank."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm (Zhang & Sennrich 2019), statistics in float32."""
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer 2020)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding (Su et al. 2021) in the half-split form HF uses; ``sin`` has its first half negated."""
    half = x.shape[-1] // 2
    swapped = torch.cat([x[..., half:], x[..., :half]], dim=-1)
    return x * cos + swapped * sin


def norm_and_rotate(
    qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor, sin: Tensor, heads: Heads
) -> tuple[Tensor, ...]:
    """Splits the fused product, normalises q and k where the model does, and rotates them."""
    split = qkv.unflatten(1, (-1, heads.dim)).split([heads.query, heads.kv, heads.kv], dim=1)
    q, k, v = split
    if q_weight is not None and k_weight is not None:
        q, k = rms_norm(q, q_weight, heads.eps), rms_norm(k, k_weight, heads.eps)
    rotated = rotate(torch.cat([q, k], dim=1), cos, sin)
    q, k = rotated.split([heads.query, heads.kv], dim=1)
    return q, k, v


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    z = logits.float()
    return z if temperature == 1.0 else z / temperature


def vocab_stats(logits: Tensor, targets: Tensor, temperature: float) -> VocabStats:
    """See :attr:`Pointwise.vocab_stats`."""
    z = _scaled(logits, temperature)
    mine = (targets >= 0) & (targets < z.shape[1])
    picked = z.gather(1, targets.clamp(0, z.shape[1] - 1)[:, None]).squeeze(1) * mine
    top = z.amax(dim=1)
    weights = (z - top[:, None]).exp_()
    return VocabStats(top=top, total=weights.sum(dim=1), weighted=(weights * z).sum(dim=1), picked=picked)


def vocab_gradient(logits: Tensor, targets: Tensor, temperature: float, parts: VocabGradient) -> Tensor:
    """See :attr:`Pointwise.vocab_gradient`."""
    log_p = _scaled(logits, temperature) - parts.log_z[:, None]
    p = log_p.exp()
    if parts.grad_entropy.any():
        scale = -parts.grad_entropy[:, None] * (log_p + parts.entropy[:, None])
        grad = p * (scale - parts.grad_logprobs[:, None])
    else:
        grad = p.mul_(-parts.grad_logprobs[:, None])
    rows = torch.nonzero((targets >= 0) & (targets < grad.shape[1])).squeeze(1)
    grad[rows, targets[rows]] += parts.grad_logprobs[rows]
    return (grad / temperature).to(logits.dtype)


PLAIN = Pointwise(
    rms_norm=rms_norm,
    swiglu=swiglu,
    norm_and_rotate=norm_and_rotate,
    vocab_stats=vocab_stats,
    vocab_gradient=vocab_gradient,
    chunk_bytes=64 * 2**20,
)
