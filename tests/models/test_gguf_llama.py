"""gguf_llama.py: a model written the way llama.cpp writes it comes back as the model it was."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from framework.errors import ModelError
from framework.models.gguf_llama import LAYER_TENSORS, TENSORS, convert_gguf
from framework.models.tiny import make_tiny_model

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 4, 2, 32


def sides_together(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """llama.cpp's row order of q and k: (0, d/2, 1, d/2 + 1, ...) in each head."""
    order = np.arange(HEAD_DIM).reshape(2, HEAD_DIM // 2).T.flatten()
    return weight.reshape(num_heads, HEAD_DIM, -1)[:, order].reshape(weight.shape)


def write_gguf(folder: Path, path: Path, *, architecture: str = "llama") -> Path:
    """The model in ``folder`` as llama.cpp's converter would write it, with a tokenizer of bytes."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(2)
    writer.add_context_length(2048)
    writer.add_embedding_length(128)
    writer.add_feed_forward_length(128)
    writer.add_head_count(NUM_HEADS)
    writer.add_head_count_kv(NUM_KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(HEAD_DIM)
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġ1"]
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * 257)
    writer.add_token_merges(["Ġ 1"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    for name, tensor in load_file(folder / "model.safetensors").items():
        stem, _, kind = name.rpartition(".")
        data = tensor.numpy()
        if stem.startswith("model.layers."):
            _, _, layer, member = stem.split(".", 3)
            short = next(key for key, value in LAYER_TENSORS.items() if value == member)
            if short in ("attn_q", "attn_k"):
                data = sides_together(data, NUM_HEADS if short == "attn_q" else NUM_KV_HEADS)
            writer.add_tensor(f"blk.{layer}.{short}.{kind}", data)
        else:
            writer.add_tensor(f"{next(key for key, value in TENSORS.items() if value == stem)}.{kind}", data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("tied", [True, False])
def test_the_model_comes_back(tmp_path: Path, tied: bool) -> None:
    original = make_tiny_model(tmp_path / "original", family="llama", vocab_size=260, tied=tied, dtype=torch.float32)
    (tmp_path / "converted").mkdir()
    convert_gguf(write_gguf(original, tmp_path / "model.gguf"), tmp_path / "converted")

    before, after = (load_file(folder / "model.safetensors") for folder in (original, tmp_path / "converted"))
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name].to(torch.bfloat16)) for name in before)

    ids = torch.arange(3, 19)[None]
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(original, dtype=torch.bfloat16)(input_ids=ids).logits
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "converted")
        assert model.dtype == torch.bfloat16
        assert torch.equal(model(input_ids=ids).logits, expected)
    assert (model.config.rms_norm_eps, model.generation_config.eos_token_id) == (1e-6, 2)


def test_the_tokenizer_splits_digits_and_keeps_the_chat_template(tmp_path: Path) -> None:
    original = make_tiny_model(tmp_path / "original", family="llama", vocab_size=260)
    (tmp_path / "converted").mkdir()
    convert_gguf(write_gguf(original, tmp_path / "model.gguf"), tmp_path / "converted")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "converted")
    # "Ġ1" is in the vocabulary, but a digit never joins what stands before it.
    assert tokenizer.tokenize("a 12") == ["a", "Ġ", "1", "2"]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.model_max_length) == ("<|im_end|>", "<|im_end|>", 2048)


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    original = make_tiny_model(tmp_path / "original", family="llama", vocab_size=260)
    path = write_gguf(original, tmp_path / "model.gguf", architecture="mamba")
    with pytest.raises(ModelError, match="holds architecture 'mamba'"):
        convert_gguf(path, tmp_path)
