"""The engine's norms of the heads of q and k, and their rotation, by the trainer's kernel. Holds for vllm 0.26.0.

For models that have such norms (Qwen3). The trainer rounds as vLLM does but sums in its own order; here it is one order
for both, and one kernel in place of vLLM's three.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from framework.kernels.norm_rotate import norm_rotate, norm_rotate_shapes


def install() -> None:
    """Replaces the forward pass of Qwen3's attention in engines that start next in this process."""
    from vllm.model_executor.models.qwen3 import Qwen3Attention
    from vllm.utils.torch_utils import direct_register_custom_op

    if not hasattr(torch.ops.vllm, "tandem_norm_rotate"):
        direct_register_custom_op("tandem_norm_rotate", norm_rotate, fake_impl=norm_rotate_shapes)
    original = vars(Qwen3Attention)["forward"]
    forward.replaces = getattr(original, "replaces", original)  # type: ignore[attr-defined]
    Qwen3Attention.forward = forward


def forward(attention: Any, positions: Tensor, hidden_states: Tensor) -> Tensor:
    """``[T, hidden] -> [T, hidden]``, as vLLM's ``Qwen3Attention.forward``."""
    qkv, _ = attention.qkv_proj(hidden_states)
    rotary = attention.rotary_emb
    q, k = torch.ops.vllm.tandem_norm_rotate(
        qkv.contiguous(),
        attention.q_norm.weight,
        attention.k_norm.weight,
        positions,
        rotary._match_cos_sin_cache_dtype(qkv),
        attention.num_heads,
        attention.num_kv_heads,
        attention.q_norm.variance_epsilon,
    )
    v = qkv[:, attention.q_size + attention.kv_size :]
    output, _ = attention.o_proj(attention.attn(q, k, v))
    return output
