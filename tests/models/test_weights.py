"""Reading a rank's shard: equal to slicing by hand, no more bytes than the shard's, and clear words for damage."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from framework.device import HOST
from framework.errors import ModelError
from framework.models.layout import EMBEDDING, entries
from framework.models.spec import read_spec
from framework.models.weights import _read, expected_shape, load_shard, tensor_files
from tests.ranks import ROOT, clean_environment
from tests.tiny_models import VARIANTS


def load(folder: Path, rank: int = 0, size: int = 1, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return load_shard(folder, read_spec(folder), tp_rank=rank, tp_size=size, dtype=dtype, device=HOST)


def whole(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, by another reader."""
    tensors: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        tensors.update(load_file(path))
    return tensors


def rows(tensor: Tensor, rank: int, size: int) -> Tensor:
    return tensor.tensor_split(size, dim=0)[rank]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", [1, 2])
def test_shards_equal_slices_by_hand(variant: str, size: int, tiny: dict[str, Path]) -> None:
    folder, hf = tiny[variant], whole(tiny[variant])
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (variant == "qwen3")
    for rank in range(size):
        shard = load(folder, rank, size)
        for i in range(2):
            layer = f"model.layers.{i}."
            kinds = ("weight", "bias") if variant == "qwen2" else ("weight",)
            for kind in kinds:
                qkv = [rows(hf[f"{layer}self_attn.{p}_proj.{kind}"], rank, size) for p in "qkv"]
                assert torch.equal(shard.pop(f"{layer}self_attn.qkv_proj.{kind}"), torch.cat(qkv))
            gate_up = [rows(hf[f"{layer}mlp.{p}_proj.weight"], rank, size) for p in ("gate", "up")]
            assert torch.equal(shard.pop(f"{layer}mlp.gate_up_proj.weight"), torch.cat(gate_up))
            for name in (f"{layer}self_attn.o_proj.weight", f"{layer}mlp.down_proj.weight"):
                assert torch.equal(shard.pop(name), hf[name].tensor_split(size, dim=1)[rank])
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            if name in shard:
                padded = torch.nn.functional.pad(hf[name], (0, 0, 0, 576 - 515))
                assert torch.equal(shard.pop(name), rows(padded, rank, size))
        for name, tensor in shard.items():
            assert name.endswith("norm.weight")
            assert torch.equal(tensor, hf[name])


def test_a_rank_beyond_the_vocabulary_holds_padding(tmp_path: Path, tiny: dict[str, Path]) -> None:
    """515 rows in 576: of 36 blocks of 16, block 32 has 3 rows of its own and block 33 none."""
    spec = read_spec(tiny["llama"])
    table = whole(tiny["llama"])[EMBEDDING.name]
    path = tmp_path / "table.safetensors"
    save_file({EMBEDDING.name: table}, path)
    with safe_open(path, framework="pt") as file:
        view = {EMBEDDING.name: file.get_slice(EMBEDDING.name)}
        partial = _read(EMBEDDING, view, spec, tp_rank=32, tp_size=36)
        empty = _read(EMBEDDING, view, spec, tp_rank=33, tp_size=36)
    assert torch.equal(partial[:3], table[512:])
    assert partial[3:].abs().sum() == 0
    assert torch.equal(empty, torch.zeros(16, 64))


def test_dtype_is_converted(tiny: dict[str, Path]) -> None:
    full, half = load(tiny["llama"]), load(tiny["llama"], dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in half.values()} == {torch.bfloat16}
    assert all(torch.equal(half[name], full[name].bfloat16()) for name in full)


MEASURE = """
import re, sys, torch
from pathlib import Path
from framework.device import HOST
from framework.models.spec import read_spec
from framework.models.weights import load_shard, tensor_files
folder, size = Path(sys.argv[1]), int(sys.argv[2])
spec, files = read_spec(folder), tensor_files(folder)
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
before = peak()
shard = load_shard(folder, spec, tp_rank=size - 1, tp_size=size, dtype=torch.float32, device=HOST)
assert all(t.sum() == t.numel() for t in shard.values())  # whole tensors are views of the file until touched
print(peak() - before, sum(t.numel() * t.element_size() for t in shard.values()))
"""


def test_only_the_shard_is_read(tmp_path: Path) -> None:
    """The file is mapped, so bytes that are read become resident: a sixteenth must not cost what the whole does."""
    config = {
        "model_type": "llama",
        "hidden_size": 512,
        "num_hidden_layers": 1,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "intermediate_size": 8192,
        "vocab_size": 8192,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    spec = read_spec(tmp_path)
    names = [source for entry in entries(spec) for source in entry.sources]
    tensors = {name: torch.ones(expected_shape(name, spec)) for name in names}
    total = sum(t.numel() * 4 for t in tensors.values())
    save_file(tensors, tmp_path / "model.safetensors")
    del tensors
    growth = {}
    for size in (1, 16):
        command = [sys.executable, "-c", MEASURE, str(tmp_path), str(size)]
        result = subprocess.run(
            command, cwd=ROOT, env=clean_environment(), capture_output=True, text=True, timeout=120, check=True
        )
        growth[size], shard = map(int, result.stdout.split())
    assert shard <= total / 16 * 1.01
    # The shard, the mapped pages it was copied from, and all of down_proj, a quarter of the model, because its columns
    # lie on every page.
    assert growth[16] <= 0.6 * total < total <= growth[1]


Damage = Callable[[Path], None]


def _rewrite(change: Callable[[dict[str, Tensor]], None]) -> Damage:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return damage


def _truncate(name: str) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return damage


def _cut_k(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.1.self_attn.k_proj.weight"] = torch.zeros(16, 64)


def _lose_norm(tensors: dict[str, Tensor]) -> None:
    del tensors["model.norm.weight"]


def _add_bias(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.0.self_attn.o_proj.bias"] = torch.zeros(64)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "there is no model.safetensors and no model.saf"),
        (_truncate("model.safetensors"), "model.safetensors is damaged: .*fetch the model again"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b""), "model.safetensors is damaged"),
        (_rewrite(_cut_k), r"layers.1.self_attn.k_proj.weight' has shape \(16, 64\), config.json implies \(32, 64\)"),
        (_rewrite(_lose_norm), "the checkpoint has no tensor 'model.norm.weight'"),
        (_rewrite(_add_bias), r"tensors config.json does not imply: \['model.layers.0.self_attn.o_proj.bias'\]"),
    ],
    ids=["no file", "truncated", "empty", "wrong shape", "missing tensor", "unknown tensor"],
)
def test_damage_of_a_single_file(damage: Damage, message: str, tmp_path: Path, tiny: dict[str, Path]) -> None:
    folder = shutil.copytree(tiny["llama"], tmp_path / "model")
    damage(folder)
    with pytest.raises(ModelError, match=message):
        load(folder)


def _shard_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("model-*.safetensors"))


def test_damage_of_a_sharded_checkpoint(tmp_path: Path, tiny: dict[str, Path]) -> None:
    folder = shutil.copytree(tiny["qwen3"], tmp_path / "model")
    index = folder / "model.safetensors.index.json"
    second = _shard_names(folder)[1]
    assert len(set(tensor_files(folder).values())) == len(_shard_names(folder)) > 2
    intact = (folder / second).read_bytes()
    (folder / second).write_bytes(intact[:1000])
    with pytest.raises(ModelError, match=r"the weights are damaged.*fetch the model again"):
        load(folder)
    (folder / second).unlink()
    with pytest.raises(ModelError, match=rf"lacks \['{second}'\], named in model.safetensors.index.json"):
        load(folder)
    for text in ("{", "{}", "[]"):
        index.write_text(text)
        with pytest.raises(ModelError, match=r"model.safetensors.index.json is damaged"):
            load(folder)


def test_an_index_that_points_to_the_wrong_file(tmp_path: Path, tiny: dict[str, Path]) -> None:
    folder = shutil.copytree(tiny["qwen3"], tmp_path / "model")
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    others = [name for name in _shard_names(folder) if name != content["weight_map"]["model.norm.weight"]]
    content["weight_map"]["model.norm.weight"] = others[0]
    index.write_text(json.dumps(content))
    with pytest.raises(ModelError, match=r"the weights are damaged: .*model.norm.weight"):
        load(folder)


def test_an_output_layer_saved_beside_tied_embeddings_is_ignored(tmp_path: Path, tiny: dict[str, Path]) -> None:
    folder = shutil.copytree(tiny["qwen2"], tmp_path / "model")
    before = load(folder)

    def add_head(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    _rewrite(add_head)(folder)
    after = load(folder)
    assert set(after) == set(before)
    assert torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
