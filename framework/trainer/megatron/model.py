"""Builds Megatron's GPTModel from our ModuleSpec and binds its frozen weights to tensors somebody else owns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from framework.models.layout import EMBEDDING, FINAL_NORM, LM_HEAD
from framework.trainer.megatron.layers import DecoderLayer, LayerContext, RMSNorm


class HiddenStates(nn.Module):
    """Stands in for the output layer: hands the hidden states on, so that only scored positions are projected."""

    def forward(self, hidden: Tensor, weight: Any = None, runtime_gather_output: Any = None) -> tuple[Tensor, None]:
        """``[T or T/tp, 1, hidden]`` in and out."""
        return hidden, None


def build_model(context: LayerContext, dtype: torch.dtype) -> GPTModel:
    """A GPTModel without weights: :func:`bind_weights` gives it some.

    Args:
        context: model spec, mesh and policies.
        dtype: compute dtype.
    """
    spec = context.spec
    config = TransformerConfig(
        num_layers=spec.num_layers,
        hidden_size=spec.hidden_size,
        num_attention_heads=spec.num_heads,
        num_query_groups=spec.num_kv_heads,
        kv_channels=spec.head_dim,
        ffn_hidden_size=spec.ffn_size,
        normalization="RMSNorm",
        layernorm_epsilon=spec.norm_eps,
        add_bias_linear=False,
        add_qkv_bias=spec.qkv_bias,
        gated_linear_unit=True,
        activation_func=nn.functional.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_dropout_fusion=False,
        tensor_model_parallel_size=context.mesh.tp_size,
        sequence_parallel=context.sequence_parallel,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        use_cpu_initialization=True,
        perform_initialization=False,
    )
    layer = ModuleSpec(module=DecoderLayer, params={"context": context})
    block = TransformerBlockSubmodules(layer_specs=[layer] * spec.num_layers, layer_norm=RMSNorm)
    with torch.device("meta"):
        model = GPTModel(
            config=config,
            transformer_layer_spec=block,
            vocab_size=spec.padded_vocab_size,
            max_sequence_length=spec.max_position_embeddings,
            share_embeddings_and_output_weights=True,
            position_embedding_type="none",
        )
    model.output_layer = HiddenStates()
    model.decoder.final_layernorm.pointwise = context.pointwise  # Megatron builds this one, with its own arguments
    model.requires_grad_(False)
    return model


def bind_weights(model: GPTModel, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Makes the model's weights these very tensors, without copying.

    Args:
        model: from :func:`build_model`.
        weights: this rank's shard by the layout's names; every one must be used.

    Returns:
        The tensors that the model now computes with, by the same names: the leaves of a backward pass that trains them.
    """
    remaining = dict(weights)
    embedding = remaining.pop(EMBEDDING.name)
    parameter = nn.Parameter(embedding, requires_grad=False)  # Megatron's module takes nothing else
    model.embedding.word_embeddings.weight = parameter
    model.decoder.final_layernorm.weight = remaining.pop(FINAL_NORM.name)
    remaining.pop(LM_HEAD.name, None)
    for name, tensor in remaining.items():
        module_path, _, attribute = name.removeprefix("model.layers.").rpartition(".")
        setattr(model.decoder.layers.get_submodule(module_path), attribute, tensor)
    unbound = [
        f"{path}.weight"
        for path, module in model.named_modules()
        if "weight" in module._buffers and module._buffers["weight"] is None
    ]
    assert not unbound, f"weights without a tensor: {unbound}"
    return {**weights, EMBEDDING.name: parameter}
