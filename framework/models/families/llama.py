"""Llama (2, 3, 3.1, SmolLM2 and others with ``model_type: llama``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from framework.errors import ModelError
from framework.models.layout import DENSE_LAYER
from framework.models.spec import ModelSpec, common_fields

LAYER_TABLE = DENSE_LAYER


def spec(config: Mapping[str, Any]) -> ModelSpec:
    """Reads a Llama config; biases are not supported."""
    for key in ("attention_bias", "mlp_bias"):
        if config.get(key, False):
            raise ModelError(f"config.json: {key}=true is not supported for Llama")
    return ModelSpec(
        family="llama",
        tied_embeddings=config.get("tie_word_embeddings", False),
        qkv_bias=False,
        qk_norm=False,
        **common_fields(config),
    )
