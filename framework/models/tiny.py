"""Small random models in Hugging Face's format, for tests and for tensor parallelism on a laptop.

Weights have a standard deviation of 0.05, so that logits differ; biases and norm weights are random too, so that a
forgotten one shows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from framework.errors import ModelError

FAMILIES = ("llama", "qwen2", "qwen3")
WEIGHT_STD = 0.05


def make_tiny_model(
    path: Path,
    *,
    family: str,
    tokenizer_path: Path | None = None,
    vocab_size: int = 512,
    num_layers: int = 2,
    hidden_size: int = 128,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 32,
    ffn_size: int = 128,
    tied: bool = True,
    max_position_embeddings: int = 2048,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
) -> Path:
    """Writes a model folder and returns it. The same arguments give the same bytes; the global random state stays.

    Args:
        path: folder to write into; made if missing.
        family: one of :data:`FAMILIES`. Qwen2 has biases on q, k and v, Qwen3 has norms on q and k.
        tokenizer_path: folder whose tokenizer is copied; it then decides ``vocab_size``. None writes no tokenizer.
        max_shard_size: e.g. ``"100KB"`` splits the weights over several files with an index.

    Raises:
        ModelError: an unknown family, or heads that do not fit each other.
    """
    if family not in FAMILIES:
        raise ModelError(f"family={family!r}: must be one of {list(FAMILIES)}")
    if num_heads % num_kv_heads:
        raise ModelError(f"num_heads={num_heads} must be a multiple of num_kv_heads={num_kv_heads}")
    special: dict[str, int | None] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    if tokenizer_path is not None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
        tokenizer.save_pretrained(path)
        vocab_size = len(tokenizer)
        special = {name: getattr(tokenizer, name) for name in special}
    with torch.random.fork_rng(devices=[]):
        model = _random_model(
            family,
            seed=seed,
            vocab_size=vocab_size,
            num_hidden_layers=num_layers,
            hidden_size=hidden_size,
            num_attention_heads=num_heads,
            num_key_value_heads=num_kv_heads,
            head_dim=head_dim,
            intermediate_size=ffn_size,
            tie_word_embeddings=tied,
            max_position_embeddings=max_position_embeddings,
            initializer_range=WEIGHT_STD,
            **special,
        )
    model.to(dtype).save_pretrained(path, max_shard_size=max_shard_size)  # type: ignore[operator]
    return path


def _random_model(family: str, *, seed: int, **config: Any) -> nn.Module:
    """A transformers model whose every parameter is drawn from ``seed``, in the order of its names."""
    import transformers

    configs = {
        "llama": transformers.LlamaConfig,
        "qwen2": transformers.Qwen2Config,
        "qwen3": transformers.Qwen3Config,
    }
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(configs[family](**config), dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            mean = 1.0 if name.endswith("norm.weight") else 0.0
            parameter.normal_(mean, WEIGHT_STD, generator=generator)
    return model
