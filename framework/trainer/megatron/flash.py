"""The engine's forward kernel of attention with another's backward kernel, over packed sequences.

FlashAttention's backward pass needs q, k, v, the output and each row's log of the softmax denominator (Dao 2023), so
kernels of different makers go together: cuDNN's where Transformer Engine is installed, else torch's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class FlashAttention(torch.autograd.Function):
    """``[T, heads, d], [T, kv_heads, d] x 2 -> [T, heads, d]``, causal within each sequence."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, packed: Any) -> Tensor:
        """``packed`` is a PackedPlan with a kernel and a backward kernel."""
        out, lse = packed.kernel(q, k, v, packed.cu_seqlens, packed.max_seqlen)
        ctx.save_for_backward(q, k, v, out, lse, packed.cu_seqlens)
        ctx.max_seqlen, ctx.back = packed.max_seqlen, packed.backward
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of q, k and v."""
        q, k, v, out, lse, cu_seqlens = ctx.saved_tensors
        return *ctx.back(grads[0], q, k, v, out, lse, cu_seqlens, ctx.max_seqlen), None


def attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor, max_seqlen: int
) -> tuple[Tensor, Tensor, Tensor]:
    """torch's kernel; arguments and results are those of :func:`cudnn_backward.attention_backward`."""
    no_dropout = torch.empty(2, dtype=torch.int64, device=q.device)  # where a generator's state would be
    ends = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    back = torch.ops.aten._flash_attention_backward
    return back(grad, q, k, v, out, lse, *ends, 0.0, True, no_dropout, no_dropout)
