"""ModelSpec: what a decoder is, read from its HF ``config.json``, checked before anything is loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from framework.errors import ModelError

VOCAB_PADDING = 64
"""vLLM pads the vocabulary to this multiple before splitting it over ranks; the layout does the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """Llama 3.1's frequency-dependent stretching of rotary embeddings (``rope_type: llama3``)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A dense decoder of the Llama kind: RMSNorm, rotary attention with grouped heads, SwiGLU."""

    family: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    vocab_size: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    tied_embeddings: bool
    """The output layer is the embedding table."""
    qkv_bias: bool
    qk_norm: bool
    """RMSNorm over each head's query and key before the rotation (Qwen3)."""
    max_position_embeddings: int

    @property
    def padded_vocab_size(self) -> int:
        return -(-self.vocab_size // VOCAB_PADDING) * VOCAB_PADDING

    @property
    def q_size(self) -> int:
        """Rows of the whole q_proj."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Rows of the whole k_proj, and of v_proj."""
        return self.num_kv_heads * self.head_dim

    def check_tensor_parallel(self, size: int) -> None:
        """Refuses a tensor-parallel size that does not divide what is split.

        Raises:
            ModelError: naming the size and the number it does not divide.
        """
        for what, number in (
            ("attention heads", self.num_heads),
            ("key/value heads", self.num_kv_heads),
            ("rows of the MLP", self.ffn_size),
            ("rows of the padded vocabulary", self.padded_vocab_size),
        ):
            if number % size:
                raise ModelError(
                    f"parallel.tensor_parallel_size={size} does not divide this model's {number} {what}; "
                    f"choose a divisor of {number}, or another model (model.name_or_path)"
                )
        if self.padded_vocab_size // size * (size - 1) >= self.vocab_size:
            raise ModelError(
                f"parallel.tensor_parallel_size={size} leaves a rank without a token of this model's vocabulary of "
                f"{self.vocab_size}; choose a smaller size"
            )

    def projection_shape(self, target: str) -> tuple[int, int]:
        """Whole (out_features, in_features) of one HF projection."""
        h, f, q, kv = self.hidden_size, self.ffn_size, self.q_size, self.kv_size
        return {
            "q_proj": (q, h),
            "k_proj": (kv, h),
            "v_proj": (kv, h),
            "o_proj": (h, q),
            "gate_proj": (f, h),
            "up_proj": (f, h),
            "down_proj": (h, f),
        }[target]


def read_spec(folder: Path) -> ModelSpec:
    """Reads ``folder/config.json``.

    Raises:
        ModelError: the file is missing or damaged, or the family or one of its options is not supported.
    """
    from framework.models.families import FAMILIES  # the families build on this module

    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
    except OSError as error:
        raise ModelError(f"model.name_or_path={folder}: config.json cannot be read from it: {error}") from error
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path} must hold a JSON object, not a {type(config).__name__}")
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise ModelError(
            f"{path}: model_type={model_type!r} is not supported; supported families are {sorted(FAMILIES)}"
        )
    try:
        return FAMILIES[model_type].spec(config)
    except KeyError as error:
        raise ModelError(f"{path} lacks the key {error}") from error


def common_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """The ModelSpec fields that every family spells alike.

    Raises:
        ModelError: an activation, rope type or quantisation that is not implemented.
    """
    if config.get("hidden_act", "silu") != "silu":
        raise ModelError(f"config.json: hidden_act={config['hidden_act']!r} is not supported, only 'silu'")
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown")
        raise ModelError(
            f"config.json: quantization_config ({method}) is not supported; "
            f"set model.name_or_path to the unquantised checkpoint"
        )
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    heads = config["num_attention_heads"]
    return {
        "hidden_size": config["hidden_size"],
        "num_layers": config["num_hidden_layers"],
        "num_heads": heads,
        "num_kv_heads": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim") or config["hidden_size"] // heads,
        "ffn_size": config["intermediate_size"],
        "vocab_size": config["vocab_size"],
        "norm_eps": config["rms_norm_eps"],
        "rope_theta": float(theta),
        "rope_scaling": _rope_scaling(rope),
        "max_position_embeddings": config["max_position_embeddings"],
    }


def _rope_scaling(rope: Mapping[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise ModelError(f"config.json: rope_type={kind!r} is not supported, only 'default' and 'llama3'")
    return RopeScaling(
        factor=float(rope["factor"]),
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        original_max_position_embeddings=int(rope["original_max_position_embeddings"]),
    )
