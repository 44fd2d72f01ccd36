"""Tiny random checkpoints, one per thing a family can do, made once per test session.

The vocabulary is no multiple of 64 and heads are grouped, so that a forgotten padding row or head shows in the logits.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from framework.models.tiny import make_tiny_model

VOCAB_SIZE = 515
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,  # of the 8 frequencies one is kept, one interpolated, six divided
}
SHAPE: Mapping[str, Any] = {"vocab_size": VOCAB_SIZE, "hidden_size": 64, "head_dim": 16, "ffn_size": 96}
"""Smaller than what vLLM takes: here only the trainer and transformers run."""
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "llama": {"family": "llama", "tied": False},
    "llama3_rope": {"family": "llama", "tied": True},
    "qwen2": {"family": "qwen2", "tied": True},
    "qwen3": {"family": "qwen3", "tied": False, "head_dim": 32, "max_shard_size": "100KB"},
}
"""``qwen3`` has head_dim * heads != hidden_size, and lies in several files with an index."""


def make(variant: str, folder: Path) -> Path:
    """Writes ``folder/variant`` in float32 and returns it."""
    path = make_tiny_model(folder / variant, **{**SHAPE, **VARIANTS[variant]})
    if variant == "llama3_rope":  # rotary embeddings have no weights, so the checkpoint fits either kind
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**config, "rope_parameters": LLAMA3_ROPE}))
    return path


def make_all(folder: Path) -> dict[str, Path]:
    """Every variant by name."""
    return {variant: make(variant, folder) for variant in VARIANTS}
