"""Qwen2 and Qwen2.5, dense: biases on q, k and v."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from framework.errors import ModelError
from framework.models.layout import DENSE_LAYER, QKV_BIAS
from framework.models.spec import ModelSpec, common_fields

LAYER_TABLE = DENSE_LAYER + QKV_BIAS


def spec(config: Mapping[str, Any]) -> ModelSpec:
    """Reads a Qwen2 config; sliding windows are not supported."""
    if config.get("use_sliding_window", False):
        raise ModelError("config.json: use_sliding_window=true is not supported for Qwen2")
    fields = common_fields(config)
    if fields["head_dim"] * fields["num_heads"] != fields["hidden_size"]:
        raise ModelError(
            f"config.json: head_dim={fields['head_dim']} times {fields['num_heads']} heads is not "
            f"hidden_size={fields['hidden_size']}; for Qwen2 the engine assumes that it is"
        )
    return ModelSpec(
        family="qwen2",
        tied_embeddings=config.get("tie_word_embeddings", False),
        qkv_bias=True,
        qk_norm=False,
        **fields,
    )
