"""The decoder layer that our ModuleSpec puts into Megatron's TransformerBlock. Names follow the HF checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import BaseTransformerLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts, noop_context_fn

from framework.distributed import Mesh
from framework.models.layout import LAYER
from framework.models.spec import ModelSpec
from framework.trainer.megatron.attention import PackedPlan, attend
from framework.trainer.megatron.lora_linear import ColumnParallelLinear, LoraSwitch, ParallelLinear, RowParallelLinear
from framework.trainer.megatron.pointwise import PLAIN, Heads, Pointwise


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerContext:
    """What every layer is built from."""

    spec: ModelSpec
    mesh: Mesh
    switch: LoraSwitch
    sequence_parallel: bool
    recompute: str
    """What is computed again in the backward pass instead of kept.

    ``none``, ``mlp``, ``all_but_attention`` (which keeps the attention's output, the dearest to compute again in long
    sequences) or ``full``.
    """
    pointwise: Pointwise


Linear = TypeVar("Linear", bound=ParallelLinear)


def _linear(kind: type[Linear], path: str, context: LayerContext) -> Linear:
    return kind(
        path,
        context.mesh,
        context.switch,
        sequence_parallel=context.sequence_parallel,
        pointwise=context.pointwise,
    )


class RMSNorm(nn.Module):
    """Root-mean-square norm (Zhang & Sennrich 2019) with a frozen weight; also Megatron's final norm."""

    weight: Tensor

    def __init__(
        self, config: TransformerConfig | None, hidden_size: int, eps: float, pointwise: Pointwise = PLAIN
    ) -> None:
        super().__init__()
        self.eps = eps
        self.hidden_size = hidden_size
        self.pointwise = pointwise
        self.register_buffer("weight", None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., hidden] -> [..., hidden]``, statistics in float32."""
        return self.pointwise.rms_norm(x, self.weight, self.eps)


class SelfAttention(nn.Module):
    """Grouped-query attention whose fused projection splits ``[q | k | v]``, as the engine's does."""

    def __init__(self, prefix: str, context: LayerContext) -> None:
        super().__init__()
        spec, mesh = context.spec, context.mesh
        tp = mesh.tp_size
        self.heads = Heads(query=spec.num_heads // tp, kv=spec.num_kv_heads // tp, dim=spec.head_dim, eps=spec.norm_eps)
        self.pointwise = context.pointwise
        self.qkv_proj = _linear(ColumnParallelLinear, prefix + "qkv_proj", context)
        self.o_proj = _linear(RowParallelLinear, prefix + "o_proj", context)
        self.q_norm = RMSNorm(None, spec.head_dim, spec.norm_eps) if spec.qk_norm else None
        self.k_norm = RMSNorm(None, spec.head_dim, spec.norm_eps) if spec.qk_norm else None

    def forward(self, x: Tensor, packed: PackedPlan) -> Tensor:
        """``[T or T/tp, hidden] -> [T or T/tp, hidden]``."""
        q_weight = None if self.q_norm is None else self.q_norm.weight
        k_weight = None if self.k_norm is None else self.k_norm.weight
        qkv = self.qkv_proj(x)
        q, k, v = self.pointwise.norm_and_rotate(qkv, q_weight, k_weight, packed.cos, packed.sin, self.heads)
        return self.o_proj(attend(q, k, v, packed))


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020): down(silu(gate(x)) * up(x))."""

    def __init__(self, prefix: str, context: LayerContext) -> None:
        super().__init__()
        self.pointwise = context.pointwise
        self.gate_up_proj = _linear(ColumnParallelLinear, prefix + "gate_up_proj", context)
        self.down_proj = _linear(RowParallelLinear, prefix + "down_proj", context)

    def forward(self, x: Tensor) -> Tensor:
        """``[T or T/tp, hidden] -> [T or T/tp, hidden]``."""
        return self.down_proj(self.pointwise.swiglu(self.gate_up_proj(x)))


class DecoderLayer(MegatronModule, BaseTransformerLayer):
    """Pre-norm attention and MLP with residuals, over flat tokens."""

    def __init__(
        self, config: TransformerConfig, context: LayerContext, layer_number: int = 1, **megatron: Any
    ) -> None:
        """``megatron`` takes what TransformerBlock also passes and this layer does not need (groups, stage)."""
        super().__init__(config=config)
        prefix = LAYER.format(i=layer_number - 1)
        self.layer_number = layer_number
        self.recompute = context.recompute
        spec = context.spec
        self.input_layernorm = RMSNorm(None, spec.hidden_size, spec.norm_eps, context.pointwise)
        self.self_attn = SelfAttention(prefix + "self_attn.", context)
        self.post_attention_layernorm = RMSNorm(None, spec.hidden_size, spec.norm_eps, context.pointwise)
        self.mlp = MLP(prefix + "mlp.", context)

    def forward(self, hidden_states: Tensor, packed_seq_params: PackedPlan, **megatron: Any) -> tuple[Tensor, None]:
        """``[T or T/tp, 1, hidden]`` in and out; the second result is Megatron's cross-attention context."""
        x = hidden_states.squeeze(1)
        if not torch.is_grad_enabled():
            return self._layer(x, packed_seq_params)[:, None], None
        if not x.requires_grad:
            x = x.detach().requires_grad_()  # the frozen embedding gives no graph; the first layer starts one
        if self.recompute == "full":
            x = _recomputed(self._layer, x, packed_seq_params)
        elif self.recompute == "all_but_attention":
            x = _recomputed(self._layer, x, packed_seq_params, keep=packed_seq_params.operators)
        else:
            x = self._layer(x, packed_seq_params)
        return x[:, None], None

    def _layer(self, x: Tensor, packed: PackedPlan) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), packed)
        if self.recompute == "mlp" and torch.is_grad_enabled():
            return _recomputed(self._mlp, x)
        return self._mlp(x)

    def _mlp(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.post_attention_layernorm(x))


def _recomputed(function: Any, *inputs: Any, keep: tuple[Any, ...] = ()) -> Tensor:
    """Runs ``function`` keeping only its inputs and the results of the operators in ``keep``.

    No random state is saved: dropout masks come from counters.
    """
    context = partial(create_selective_checkpoint_contexts, list(keep)) if keep else noop_context_fn
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=context)
