"""Causal attention over packed sequences, and the per-microbatch facts that every layer needs.

Sequences lie end to end in one token axis. A plan, made once per microbatch, says how to attend within each. On a GPU
by the engine's kernel, so that the trainer's forward pass has the engine's bits, with cuDNN's backward kernel where
Transformer Engine brings it, else torch's; without it one sequence alone goes through torch's cuDNN both ways, whose
backward pass is 1.6 times as fast, unless the bits are asked for (``numerics=exact``). Elsewhere by dense products over
buckets of sequences of similar length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from framework.models.spec import ModelSpec, RopeScaling
from framework.trainer.megatron import cudnn_backward, flash, pointwise
from framework.trainer.megatron.bucket_attention import Bucket, BucketAttention, make_buckets

ATTENTION_OPERATORS = (
    torch.ops.aten._flash_attention_forward.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
)
"""torch's, one of which runs without an engine's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedPlan:
    """What one microbatch's layers share."""

    cos: Tensor
    """``[T, 1, head_dim]`` compute dtype."""
    sin: Tensor
    """``[T, 1, head_dim]`` compute dtype, its first half negated: q * cos + swap_halves(q) * sin rotates."""
    cu_seqlens: Tensor
    """``[S + 1]`` int32 on the device."""
    max_seqlen: int
    buckets: tuple[Bucket, ...]
    """Empty where a variable-length kernel is used."""
    kernel: Any
    """The engine's operator ``(q, k, v, cu_seqlens, max_seqlen) -> (out, lse)``; None where another is used."""
    backward: Any
    """What goes with that kernel, of :func:`backward_kernel`."""

    @property
    def operators(self) -> tuple[Any, ...]:
        """Every operator that :func:`attend` may run; elsewhere than on a GPU it is spelled differently."""
        return ATTENTION_OPERATORS if self.kernel is None else (*ATTENTION_OPERATORS, self.kernel)


def inverse_frequencies(spec: ModelSpec) -> Tensor:
    """``[head_dim / 2]`` float32, with Llama 3.1's stretching where the model asks for it."""
    exponent = torch.arange(0, spec.head_dim, 2, dtype=torch.float32) / spec.head_dim
    frequencies = 1.0 / spec.rope_theta**exponent
    return frequencies if spec.rope_scaling is None else _stretch(frequencies, spec.rope_scaling)


def _stretch(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3.1: long wavelengths are divided by the factor, short ones kept, those between interpolated."""
    wavelength = 2 * torch.pi / frequencies
    low = scaling.original_max_position_embeddings / scaling.low_freq_factor
    high = scaling.original_max_position_embeddings / scaling.high_freq_factor
    smooth = (scaling.original_max_position_embeddings / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    between = (1 - smooth) * frequencies / scaling.factor + smooth * frequencies
    stretched = torch.where(wavelength > low, frequencies / scaling.factor, frequencies)
    return torch.where((wavelength <= low) & (wavelength >= high), between, stretched)


def plan(
    position_ids: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    frequencies: Tensor,
    *,
    dtype: torch.dtype,
    varlen: bool,
    kernel: Any = None,
    backward: Any = flash.attention_backward,
) -> PackedPlan:
    """Makes the plan of one microbatch.

    Args:
        position_ids: ``[T]`` int64 on the device.
        cu_seqlens: ``[S + 1]`` int32 on the host.
        max_seqlen: of the microbatch.
        frequencies: ``[head_dim / 2]`` float32 on the device.
        dtype: compute dtype.
        varlen: whether variable-length kernels exist for the device.
        kernel: the engine's, see :attr:`PackedPlan.kernel`.
        backward: see :attr:`PackedPlan.backward`.
    """
    angles = position_ids[:, None].float() * frequencies
    cos, sin = angles.cos(), angles.sin()
    device = position_ids.device
    return PackedPlan(
        cos=torch.cat([cos, cos], dim=-1)[:, None].to(dtype),
        sin=torch.cat([-sin, sin], dim=-1)[:, None].to(dtype),
        cu_seqlens=cu_seqlens.to(device),
        max_seqlen=max_seqlen,
        buckets=() if varlen else make_buckets(cu_seqlens.tolist(), device),
        kernel=kernel,
        backward=backward,
    )


def backward_kernel(head_dim: int, *, transformer_engine: bool) -> Any:
    """What goes with the engine's kernel: cuDNN's where Transformer Engine is loaded and has one, else torch's."""
    there = transformer_engine and head_dim <= cudnn_backward.LARGEST_HEAD
    return cudnn_backward.attention_backward if there else flash.attention_backward


def by_cudnn(backward: Any) -> bool:
    """Whether this is cuDNN's, as fast for one sequence alone as torch's own pair of kernels."""
    return backward is cudnn_backward.attention_backward


def rotate(x: Tensor, packed: PackedPlan) -> Tensor:
    """Rotates ``[T, heads, head_dim]`` by the plan's angles."""
    return pointwise.rotate(x, packed.cos, packed.sin)


def attend(q: Tensor, k: Tensor, v: Tensor, packed: PackedPlan) -> Tensor:
    """Causal attention within each sequence.

    Args:
        q: ``[T, heads, head_dim]``.
        k: ``[T, kv_heads, head_dim]``; each key/value head serves ``heads / kv_heads`` neighbouring query heads.
        v: like ``k``.
        packed: the microbatch's plan.

    Returns:
        ``[T, heads * head_dim]``.
    """
    if packed.buckets:
        return BucketAttention.apply(q, k, v, packed.buckets).flatten(1)
    if packed.kernel is not None:
        return flash.FlashAttention.apply(q, k, v, packed).flatten(1)
    return _attend_varlen(q, k, v, packed) if len(packed.cu_seqlens) > 2 else _attend_alone(q, k, v)


def _attend_alone(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One sequence, by whichever kernel torch finds fastest for it."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return out[0].transpose(0, 1).flatten(1)


def _attend_varlen(q: Tensor, k: Tensor, v: Tensor, packed: PackedPlan) -> Tensor:
    """torch's variable-length flash kernel, by the operator itself.

    ``varlen_attn`` of torch 2.11 refuses grouped heads, which the kernel and its backward know.
    """
    lengths = (packed.cu_seqlens, packed.cu_seqlens, packed.max_seqlen, packed.max_seqlen)
    return torch.ops.aten._flash_attention_forward(q, k, v, *lengths, 0.0, True, False)[0].flatten(1)
