"""The engine's attention kernel as an operator for the trainer: its forward pass, to the bit. Holds for vllm 0.26.0.

vLLM ships FlashAttention (on Hopper version 3, the fastest forward there, without a backward) for its own prefill; on
packed sequences it is called as vLLM calls it for prompts, with the row statistics that a backward pass needs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from framework.device import Device

_LIBRARY = torch.library.Library("tandem", "FRAGMENT")
_NAME = "engine_attention"


def engine_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> tuple[Tensor, Tensor]:
    """Causal attention within each packed sequence.

    Args:
        q: ``[T, heads, head_dim]`` bfloat16 or float16.
        k: ``[T, kv_heads, head_dim]``.
        v: like ``k``.
        cu_seqlens: ``[S + 1]`` int32 on the device.
        max_seqlen: of the sequences.

    Returns:
        ``[T, heads, head_dim]``, and ``[heads, T]`` float32: the natural logarithm of each row's softmax denominator.
    """
    from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func, get_flash_attn_version

    out, lse = flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens,
        max_seqlen_q=max_seqlen,
        max_seqlen_k=max_seqlen,
        causal=True,
        return_softmax_lse=True,
        fa_version=get_flash_attn_version(head_size=q.shape[-1]),
        num_splits=1,  # splits change the order of the sums
    )
    return out, lse


def open_attention(device: Device) -> Any:
    """The operator ``(q, k, v, cu_seqlens, max_seqlen) -> (out, lse)``; None on devices without such kernels."""
    if not device.varlen_attention:
        return None
    if not hasattr(torch.ops.tandem, _NAME):
        _LIBRARY.define(f"{_NAME}(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, int max_seqlen) -> (Tensor, Tensor)")
        _LIBRARY.impl(_NAME, engine_attention, device.torch_device.type.upper())
    return torch.ops.tandem.engine_attention.default
