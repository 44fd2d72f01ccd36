"""tiny.py: deterministic random folders that transformers loads and whose every parameter matters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from framework.errors import ModelError
from framework.models.spec import read_spec
from framework.models.tiny import FAMILIES, make_tiny_model


def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=torch.arange(1, 9)[None]).logits[0]
    return result


@pytest.mark.parametrize("family", FAMILIES)
def test_same_seed_same_bytes_and_global_random_state_untouched(tmp_path: Path, family: str) -> None:
    before = torch.random.get_rng_state()
    first = make_tiny_model(tmp_path / "a", family=family, seed=3)
    assert torch.equal(torch.random.get_rng_state(), before)
    second = make_tiny_model(tmp_path / "b", family=family, seed=3)
    other = make_tiny_model(tmp_path / "c", family=family, seed=4)
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
    assert (logits(first) - logits(other)).abs().max() > 0.1


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_is_drawn(tmp_path: Path, family: str, tied: bool) -> None:
    folder = make_tiny_model(tmp_path / "m", family=family, tied=tied)
    tensors = load_file(folder / "model.safetensors")
    assert ("lm_head.weight" in tensors) == (not tied)
    assert any(name.endswith("q_proj.bias") for name in tensors) == (family == "qwen2")
    assert any(name.endswith("q_norm.weight") for name in tensors) == (family == "qwen3")
    for name, tensor in tensors.items():
        assert 0.02 < tensor.std().item() < 0.08, name
        assert abs(tensor.mean().item() - (1.0 if name.endswith("norm.weight") else 0.0)) < 0.05, name


def test_shapes_are_those_asked_for(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "m", family="qwen3", num_layers=3, num_heads=8, num_kv_heads=4, head_dim=32)
    spec = read_spec(folder)
    assert (spec.num_layers, spec.num_heads, spec.num_kv_heads, spec.head_dim) == (3, 8, 4, 32)


def test_shards_hold_the_same_weights(tmp_path: Path) -> None:
    whole = make_tiny_model(tmp_path / "whole", family="llama")
    sharded = make_tiny_model(tmp_path / "sharded", family="llama", max_shard_size="100KB")
    assert len(list(sharded.glob("model-*-of-*.safetensors"))) >= 3
    assert (sharded / "model.safetensors.index.json").exists()
    assert torch.equal(logits(sharded), logits(whole))


def test_bfloat16_is_the_rounded_float32(tmp_path: Path) -> None:
    full = load_file(make_tiny_model(tmp_path / "full", family="llama") / "model.safetensors")
    half = load_file(make_tiny_model(tmp_path / "half", family="llama", dtype=torch.bfloat16) / "model.safetensors")
    assert all(torch.equal(half[name], full[name].to(torch.bfloat16)) for name in full)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"family": "gpt2"}, "family='gpt2'"), ({"family": "llama", "num_heads": 6, "num_kv_heads": 4}, "num_heads=6")],
)
def test_what_cannot_be_is_refused(tmp_path: Path, wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        make_tiny_model(tmp_path / "m", **wrong)  # type: ignore[arg-type]
    assert not (tmp_path / "m").exists()
