"""Shapes of the published Qwen3 dense models, with random weights: what a speed depends on, without a download."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from framework.models.layout import entries
from framework.models.spec import ModelSpec, read_spec

# layers, hidden, query heads, key/value heads, MLP rows; all: head size 128, 151,936 tokens, tied but the 8B's
QWEN3 = {
    "qwen3-0.6b": (28, 1024, 16, 8, 3072),
    "qwen3-1.7b": (28, 2048, 16, 8, 6144),
    "qwen3-4b": (36, 2560, 32, 8, 9728),
    "qwen3-8b": (36, 4096, 32, 8, 12288),
}
WEIGHT_STD = 0.02
CHAT = "{% for m in messages %}{{ m['content'] }} {% endfor %}"


def hf_config(name: str) -> dict[str, object]:
    """The model's ``config.json``."""
    layers, hidden, heads, kv_heads, ffn = QWEN3[name]
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 128,
        "intermediate_size": ffn,
        "vocab_size": 151936,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "max_position_embeddings": 40960,
        "attention_bias": False,
        "tie_word_embeddings": name != "qwen3-8b",
        "torch_dtype": "bfloat16",
        "bos_token_id": 151643,
        "eos_token_id": 151645,
    }


def write_config(name: str, folder: Path) -> ModelSpec:
    """Writes ``config.json`` and reads it back as every run does."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hf_config(name)))
    return read_spec(folder)


def source_shape(spec: ModelSpec, source: str) -> tuple[int, ...]:
    """Shape of one Hugging Face tensor of the model."""
    module = source.removesuffix(".weight").rpartition(".")[2]
    if module in ("embed_tokens", "lm_head"):
        return (spec.vocab_size, spec.hidden_size)
    if module in ("q_norm", "k_norm"):
        return (spec.head_dim,)
    return spec.projection_shape(module) if module.endswith("_proj") else (spec.hidden_size,)


def random_tensor(spec: ModelSpec, source: str, device: torch.device) -> Tensor:
    """Norms are 1, the rest normal."""
    shape = source_shape(spec, source)
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16, device=device)
    return torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(0.0, WEIGHT_STD)


def random_shard(spec: ModelSpec, device: torch.device) -> dict[str, Tensor]:
    """Weights of one rank that holds the whole model, by the layout's names."""
    return {
        entry.name: torch.cat([random_tensor(spec, source, device) for source in entry.sources])
        for entry in entries(spec)
    }


def write_checkpoint(name: str, folder: Path, device: torch.device) -> ModelSpec:
    """A model folder with random weights and a tokenizer of as many words."""
    spec = write_config(name, folder)
    tensors = {source: random_tensor(spec, source, device) for entry in entries(spec) for source in entry.sources}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(folder, spec.vocab_size)
    return spec


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """A tokenizer whose words are ``t0``, ``t1``, ...: both sides read and write the same text for every token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(vocab_size)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="t151645", pad_token="t151643", unk_token="t0", chat_template=CHAT
    )
    tokenizer.save_pretrained(folder)
