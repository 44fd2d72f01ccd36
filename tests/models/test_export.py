"""Model folders as written: they load in transformers and here, in one file or several, whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from framework.errors import StorageError
from framework.models.export import save_model
from framework.models.spec import read_spec
from framework.models.weights import load_shard
from tests.fakes import tiny_checkpoint


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    return tiny_checkpoint(folder, family="qwen3")


def trained(base: Path) -> dict[str, torch.Tensor]:
    """The base model's tensors, doubled."""
    return {name: tensor * 2 for name, tensor in load_file(base / "model.safetensors").items()}


@pytest.mark.parametrize("max_file_bytes", [2**30, 60_000])
def test_what_is_written_loads_with_the_new_weights(max_file_bytes: int, base: Path, tmp_path: Path) -> None:
    tensors = trained(base)
    save_model(tmp_path / "model", base=base, tensors=tensors, max_file_bytes=max_file_bytes)
    files = sorted(path.name for path in (tmp_path / "model").glob("*.safetensors"))
    assert (files == ["model.safetensors"]) == (max_file_bytes == 2**30)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    loaded = dict(model.named_parameters())
    for name, tensor in tensors.items():
        if name in loaded:
            assert torch.equal(loaded[name], tensor.float()), name
    shard = load_shard(
        tmp_path / "model",
        read_spec(tmp_path / "model"),
        tp_rank=0,
        tp_size=1,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    assert torch.equal(shard["model.norm.weight"], tensors["model.norm.weight"].float())
    assert AutoTokenizer.from_pretrained(tmp_path / "model").chat_template


def test_an_older_export_is_replaced_and_anything_else_is_not(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    save_model(folder, base=base, tensors=trained(base))
    save_model(folder, base=base, tensors=load_file(base / "model.safetensors"))
    assert torch.equal(
        load_file(folder / "model.safetensors")["model.norm.weight"],
        load_file(base / "model.safetensors")["model.norm.weight"],
    )
    (tmp_path / "notes").mkdir()
    with pytest.raises(StorageError, match="no model folder"):
        save_model(tmp_path / "notes", base=base, tensors=trained(base))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "notes"]
