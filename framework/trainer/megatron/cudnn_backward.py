"""Transformer Engine's backward kernel of attention, cuDNN's, where it is installed. Holds for transformer-engine 2.20.

cuDNN keeps from its own forward pass what FlashAttention keeps, the output and each row's log of the softmax
denominator, so it takes the engine's: the forward pass stays the engine's to the bit.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from framework.errors import ConfigError

LARGEST_HEAD = 128
"""The head size up to which cuDNN has this kernel for packed sequences on every GPU with bfloat16."""


def is_installed() -> bool:
    """Whether Transformer Engine is there, with its part for torch."""
    return find_spec("transformer_engine") is not None and find_spec("transformer_engine_torch") is not None


def load() -> bool:
    """Imports Transformer Engine where it is installed, and says whether it is.

    To be called before cuDNN is used: it opens its parts by name, and after torch has opened some, another version's
    may come first.

    Raises:
        ConfigError: it is installed and cannot be imported.
    """
    if not is_installed():
        return False
    try:
        import transformer_engine.pytorch  # noqa: F401 - for what importing it opens
    except (ImportError, OSError) as error:
        raise ConfigError(
            f"Transformer Engine is installed and cannot be imported: {error}. Install one made for torch "
            f"{torch.__version__}, or uninstall transformer-engine: nothing here needs it"
        ) from error
    return True


def attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor, max_seqlen: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of causal attention within each packed sequence.

    Args:
        grad: of the output, ``[T, heads, head_dim]``.
        q: ``[T, heads, head_dim]`` bfloat16 or float16.
        k: ``[T, kv_heads, head_dim]``.
        v: like ``k``.
        out: of the forward pass, like ``q``.
        lse: ``[heads, T]`` float32: the natural logarithm of each row's softmax denominator.
        cu_seqlens: ``[S + 1]`` int32 on the device.
        max_seqlen: of the sequences.

    Returns:
        Gradients of q, k and v.
    """
    from transformer_engine.pytorch.cpp_extensions import fused_attn

    no_dropout = torch.zeros(2, dtype=torch.int64, device=q.device)  # where a generator's state would be
    dq, dk, dv, *_ = fused_attn.fused_attn_bwd(
        max_seqlen,
        max_seqlen,
        cu_seqlens,
        cu_seqlens,
        q.contiguous(),
        k.contiguous(),
        v.contiguous(),
        out.contiguous(),
        grad.contiguous(),
        q.dtype,
        [lse.t().contiguous()[..., None], no_dropout],
        fused_attn.FusedAttnBackend["F16_arbitrary_seqlen"],
        cu_seqlens,
        cu_seqlens,
        qkv_layout="thd_thd_thd",
        o_format="thd",
        do_format="thd",
        dqkv_layout="thd_thd_thd",
        attn_bias_type="no_bias",
        attn_mask_type="padding_causal",
        softmax_type="vanilla",
        window_size=(-1, 0),
        bottom_right_diagonal=False,
    )
    return dq, dk, dv
