"""Qwen3, dense: RMSNorm on each head's query and key, no biases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from framework.errors import ModelError
from framework.models.layout import DENSE_LAYER, QK_NORM
from framework.models.spec import ModelSpec, common_fields

LAYER_TABLE = DENSE_LAYER + QK_NORM


def spec(config: Mapping[str, Any]) -> ModelSpec:
    """Reads a Qwen3 config; attention biases and sliding windows are not supported."""
    for key in ("attention_bias", "use_sliding_window"):
        if config.get(key, False):
            raise ModelError(f"config.json: {key}=true is not supported for Qwen3")
    return ModelSpec(
        family="qwen3",
        tied_embeddings=config.get("tie_word_embeddings", False),
        qkv_bias=False,
        qk_norm=True,
        **common_fields(config),
    )
