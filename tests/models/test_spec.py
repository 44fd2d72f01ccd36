"""config.json to ModelSpec: the numbers, and every refusal before anything loads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from framework.errors import ModelError
from framework.models.spec import ModelSpec, RopeScaling, read_spec

CONFIG: Mapping[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 16,
    "intermediate_size": 96,
    "vocab_size": 515,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
}


def write(folder: Path, **changes: Any) -> Path:
    """A folder with CONFIG changed; a value of None takes the key away."""
    config = {key: value for key, value in {**CONFIG, **changes}.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def spec(folder: Path, **changes: Any) -> ModelSpec:
    return read_spec(write(folder, **changes))


def test_the_numbers_of_a_config(tmp_path: Path) -> None:
    read = spec(tmp_path, rope_theta=1234.0, tie_word_embeddings=True)
    assert (read.q_size, read.kv_size, read.padded_vocab_size) == (96, 48, 576)
    assert (read.rope_theta, read.rope_scaling, read.tied_embeddings) == (1234.0, None, True)
    assert read.projection_shape("k_proj") == (48, 64)
    assert read.projection_shape("o_proj") == (64, 96)
    assert read.projection_shape("down_proj") == (64, 96)
    assert spec(tmp_path, vocab_size=512).padded_vocab_size == 512


def test_what_a_config_may_leave_out(tmp_path: Path) -> None:
    read = spec(tmp_path, head_dim=None, num_key_value_heads=None, hidden_size=96)
    assert (read.head_dim, read.num_kv_heads, read.rope_theta, read.tied_embeddings) == (16, 6, 10000.0, False)


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}},
        {"rope_scaling": {"rope_type": "llama3", **LLAMA3}, "rope_theta": 5e5},
        {"rope_scaling": {"type": "llama3", **LLAMA3}, "rope_theta": 5e5},
    ],
    ids=["transformers 5", "transformers 4", "transformers 4.3x"],
)
def test_rope_in_every_spelling(tmp_path: Path, changes: dict[str, Any]) -> None:
    read = spec(tmp_path, **changes)
    assert read.rope_theta == 5e5
    assert read.rope_scaling == RopeScaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt_neox"}, r"model_type='gpt_neox' is not supported.*\['llama', 'qwen2', 'qwen3'\]"),
        ({"model_type": None}, "model_type=None is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported, only 'silu'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type='linear' is not supported"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type='yarn' is not supported"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "lacks the key 'low_freq_factor'"),
        ({"hidden_size": None}, "lacks the key 'hidden_size'"),
        ({"quantization_config": {"quant_method": "fp8"}}, r"quantization_config \(fp8\).*model.name_or_path"),
        ({"attention_bias": True}, "attention_bias=true is not supported for Llama"),
        ({"mlp_bias": True}, "mlp_bias=true is not supported for Llama"),
        ({"model_type": "qwen2", "use_sliding_window": True}, "use_sliding_window=true is not supported for Qwen2"),
        ({"model_type": "qwen3", "use_sliding_window": True}, "use_sliding_window=true is not supported for Qwen3"),
        ({"model_type": "qwen3", "attention_bias": True}, "attention_bias=true is not supported for Qwen3"),
    ],
)
def test_what_is_not_implemented_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        spec(tmp_path, **changes)


def test_a_folder_without_a_config(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"model.name_or_path={tmp_path}: config.json cannot be read"):
        read_spec(tmp_path)
    write(tmp_path)
    with pytest.raises(ModelError, match=r"model.name_or_path=.*config.json: config.json cannot be read"):
        read_spec(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "is not valid JSON"), ("[1]", "must hold a JSON object, not a list"), ("\udc80", "is not valid JSON")],
)
def test_a_damaged_config(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ModelError, match=message):
        read_spec(tmp_path)


@pytest.mark.parametrize(
    ("size", "changes", "message"),
    [
        (4, {}, "tensor_parallel_size=4 does not divide this model's 6 attention heads"),
        (2, {}, "tensor_parallel_size=2 does not divide this model's 3 key/value heads"),
        (3, {"intermediate_size": 100}, "tensor_parallel_size=3 does not divide this model's 100 rows of the MLP"),
        (3, {"vocab_size": 320}, "tensor_parallel_size=3 does not divide this model's 320 rows of the padded voc"),
        (2, {"vocab_size": 30, "num_key_value_heads": 6}, "tensor_parallel_size=2 leaves a rank without a token.*30"),
    ],
)
def test_a_size_that_does_not_divide_is_refused_with_both_numbers(
    tmp_path: Path, size: int, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        spec(tmp_path, **changes).check_tensor_parallel(size)


def test_a_size_that_divides_is_accepted(tmp_path: Path) -> None:
    assert spec(tmp_path).check_tensor_parallel(3) is None  # type: ignore[func-returns-value]
    assert spec(tmp_path, num_key_value_heads=2).check_tensor_parallel(2) is None  # type: ignore[func-returns-value]
