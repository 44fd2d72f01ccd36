"""The engine's forward kernel of attention with torch's backward kernels.

FlashAttention's backward pass needs q, k, v, the output and each row's log of the softmax denominator (Dao 2023), so
kernels of different makers go together. One sequence alone goes back through cuDNN, the fastest for it; several, or
heads too large for cuDNN, through torch's variable-length kernel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CUDNN_HEAD_DIM = 128
"""The largest that cuDNN's backward pass takes on every GPU since Ampere."""


class FlashAttention(torch.autograd.Function):
    """``[T, heads, d], [T, kv_heads, d] x 2 -> [T, heads, d]``, causal within each sequence."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, packed: Any) -> Tensor:
        """``packed`` is a PackedPlan with a kernel."""
        out, lse = packed.kernel(q, k, v, packed.cu_seqlens, packed.max_seqlen)
        ctx.save_for_backward(q, k, v, out, lse, packed.cu_seqlens)
        ctx.max_seqlen = packed.max_seqlen
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of q, k and v."""
        q, k, v, out, lse, cu_seqlens = ctx.saved_tensors
        one = len(cu_seqlens) == 2 and q.shape[-1] <= CUDNN_HEAD_DIM
        back = _back_dense if one else _back_packed
        return *back(grads[0], q, k, v, out, lse, cu_seqlens, ctx.max_seqlen), None


def _no_dropout(device: torch.device) -> Tensor:
    """Where the kernels would read the state of a generator."""
    return torch.empty(2, dtype=torch.int64, device=device)


def _back_packed(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor, longest: int
) -> tuple[Tensor, ...]:
    unused = _no_dropout(q.device)
    ends = (cu_seqlens, cu_seqlens, longest, longest)
    return torch.ops.aten._flash_attention_backward(grad, q, k, v, out, lse, *ends, 0.0, True, unused, unused)


def _back_dense(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor, longest: int
) -> tuple[Tensor, ...]:
    """One sequence as a batch of one."""
    grad, q, k, v, out = (x.transpose(0, 1)[None] for x in (grad.contiguous(), q, k, v, out))
    unused = _no_dropout(q.device)
    found = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        grad, q, k, v, out, lse[None, :, :, None], unused[0], unused[1], None, None, None, longest, longest, 0.0, True
    )
    return tuple(x[0].transpose(0, 1) for x in found)
