"""Each family's spec against transformers' own config classes, and its table against transformers' own parameters."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from framework.models.families import FAMILIES
from framework.models.layout import entries
from framework.models.spec import read_spec
from tests.tiny_models import VARIANTS


@pytest.mark.parametrize("variant", VARIANTS)
def test_spec_says_what_transformers_says(variant: str, tiny: dict[str, Path]) -> None:
    spec, config = read_spec(tiny[variant]), AutoConfig.from_pretrained(tiny[variant])
    assert spec.family == VARIANTS[variant]["family"]
    assert (spec.num_heads, spec.num_kv_heads) == (config.num_attention_heads, config.num_key_value_heads)
    assert (spec.hidden_size, spec.ffn_size) == (config.hidden_size, config.intermediate_size)
    assert spec.tied_embeddings == VARIANTS[variant]["tied"] == config.tie_word_embeddings
    assert spec.rope_theta == config.rope_parameters["rope_theta"]
    assert spec.norm_eps == config.rms_norm_eps
    assert (spec.qkv_bias, spec.qk_norm) == (variant == "qwen2", variant == "qwen3")
    assert (spec.rope_scaling is not None) == (variant == "llama3_rope")


@pytest.mark.parametrize("variant", VARIANTS)
def test_table_names_every_parameter_of_transformers_once(variant: str, tiny: dict[str, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny[variant])
    sources = [source for entry in entries(read_spec(tiny[variant])) for source in entry.sources]
    assert len(sources) == len(set(sources))
    assert set(sources) == {name for name, _ in model.named_parameters()}


def test_families_are_keyed_by_their_model_type() -> None:
    assert set(FAMILIES) == {"llama", "qwen2", "qwen3"}


def test_llama3_frequencies_equal_transformers(tiny: dict[str, Path]) -> None:
    """All three bands: kept, interpolated, divided."""
    from framework.trainer.megatron.attention import inverse_frequencies

    model = AutoModelForCausalLM.from_pretrained(tiny["llama3_rope"])
    ours, theirs = inverse_frequencies(read_spec(tiny["llama3_rope"])), model.model.rotary_emb.inv_freq
    assert (ours - theirs).abs().max() <= 1e-9
    plain = [5e5 ** (-i / 8) for i in range(8)]
    ratios = [a / b for a, b in zip(ours.tolist(), plain, strict=True)]
    assert math.isclose(ratios[0], 1.0, rel_tol=1e-5)
    assert math.isclose(ratios[-1], 1 / 8, rel_tol=1e-5)
    assert any(0.13 < ratio < 0.99 for ratio in ratios)
