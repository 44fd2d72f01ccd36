"""A Llama in a GGUF file to a Hugging Face folder in bfloat16, dequantised tensor by tensor.

Only hub.py uses it, for the default model where no hub answers. transformers can load GGUF too, but how (and whether)
it can save what it loaded changes between its versions; the tokenizer still comes from there.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from framework.errors import ModelError

TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""GGUF's name of each tensor of a layer (``blk.3.attn_q.weight``), and HF's."""


def convert_gguf(gguf_file: Path, folder: Path) -> None:
    """Writes config, weights, tokenizer, chat template and generation defaults into ``folder``.

    Args:
        gguf_file: of architecture ``llama``, any quantisation that the gguf package can undo.
        folder: exists; files of the same name are overwritten.

    Raises:
        ModelError: the file is of another architecture or has a tensor that a Llama has not.
    """
    import gguf

    reader = gguf.GGUFReader(gguf_file)
    facts = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("tokenizer.ggml.t")}
    if facts["general.architecture"] != "llama":
        raise ModelError(f"{gguf_file} holds architecture {facts['general.architecture']!r}; only 'llama' is converted")
    num_heads, num_kv_heads = facts["llama.attention.head_count"], facts["llama.attention.head_count_kv"]
    tensors: dict[str, Tensor] = {}
    for tensor in reader.tensors:
        weight = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        if tensor.name.endswith(".attn_q.weight"):
            weight = _halves_together(weight, num_heads)
        elif tensor.name.endswith(".attn_k.weight"):
            weight = _halves_together(weight, num_kv_heads)
        tensors[_hf_name(tensor.name)] = weight.to(torch.bfloat16).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _write_config(facts, folder, tied="lm_head.weight" not in tensors)
    _write_tokenizer(gguf_file, folder, digits_apart=facts.get("tokenizer.ggml.pre") == "smollm", facts=facts)


def _hf_name(name: str) -> str:
    """``blk.3.attn_q.weight`` -> ``model.layers.3.self_attn.q_proj.weight``."""
    parts = name.split(".")
    if parts[0] == "blk" and len(parts) == 4 and parts[2] in LAYER_TENSORS:
        return f"model.layers.{parts[1]}.{LAYER_TENSORS[parts[2]]}.{parts[3]}"
    if len(parts) == 2 and parts[0] in TENSORS:
        return f"{TENSORS[parts[0]]}.{parts[1]}"
    raise ModelError(f"GGUF tensor {name!r} has no place in a Llama")


def _halves_together(weight: Tensor, num_heads: int) -> Tensor:
    """Undoes llama.cpp's row order of q and k, which puts the two halves of each rotary pair side by side.

    Args:
        weight: ``[num_heads * head_dim, in]``, rows of a head ordered (0, d/2, 1, d/2 + 1, ...).
        num_heads: query or key/value heads.

    Returns:
        The same shape, rows of a head ordered (0, 1, ..., d - 1), as HF and vLLM rotate them.
    """
    rows, columns = weight.shape
    pairs = weight.view(num_heads, rows // num_heads // 2, 2, columns)
    return pairs.transpose(1, 2).reshape(rows, columns)


def _write_config(facts: dict[str, Any], folder: Path, *, tied: bool) -> None:
    from transformers import LlamaConfig

    special = {name: facts[f"tokenizer.ggml.{key}_token_id"] for name, key in _SPECIAL.items()}
    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        hidden_size=facts["llama.embedding_length"],
        intermediate_size=facts["llama.feed_forward_length"],
        num_hidden_layers=facts["llama.block_count"],
        num_attention_heads=facts["llama.attention.head_count"],
        num_key_value_heads=facts["llama.attention.head_count_kv"],
        head_dim=facts["llama.rope.dimension_count"],
        vocab_size=facts["llama.vocab_size"],
        max_position_embeddings=facts["llama.context_length"],
        # GGUF keeps it in fp32: 9.999999747378752e-06 was written as 1e-05.
        rms_norm_eps=float(f"{facts['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        rope_parameters={"rope_type": "default", "rope_theta": facts["llama.rope.freq_base"]},
        tie_word_embeddings=tied,
        dtype="bfloat16",
        **special,
    ).save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps(special, indent=2) + "\n")


_SPECIAL = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
"""In SmolLM2-Instruct a turn ends with <|im_end|>, which is eos and padding too."""


def _write_tokenizer(gguf_file: Path, folder: Path, *, digits_apart: bool, facts: dict[str, Any]) -> None:
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    if digits_apart:
        # What `pre: smollm` means: every digit is a word of its own. transformers' GGUF reader does not know it.
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
            [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
        )
    tokenizer.model_max_length = facts["llama.context_length"]
    tokenizer.chat_template = facts["tokenizer.chat_template"]
    tokenizer.save_pretrained(folder)
