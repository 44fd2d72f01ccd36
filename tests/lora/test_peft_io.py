"""Adapter folders: PEFT loads ours, we load PEFT's, and what cannot be served is refused by name."""

from __future__ import annotations

import json
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen2Config, Qwen3Config

from framework.errors import AdapterError, StorageError
from framework.lora.peft_io import load_peft, save_peft
from framework.lora.spec import TARGETS, LoraSpec

Tensors = dict[str, npt.NDArray[np.float32]]

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.05,
}


def tiny(family: str = "llama") -> PreTrainedModel:
    """The same random model at every call."""
    config = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}[family](**SHAPE)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.eval()  # type: ignore[no-any-return]


def random_factors(model: PreTrainedModel, spec: LoraSpec) -> Tensors:
    rng = np.random.default_rng(1)
    tensors: Tensors = {}
    for path, module in model.named_modules():
        if path.rsplit(".", 1)[-1] in spec.targets:
            assert isinstance(module, torch.nn.Linear)
            shapes = {"A": (spec.rank, module.in_features), "B": (module.out_features, spec.rank)}
            for factor, shape in shapes.items():
                tensors[f"{path}.lora_{factor}.weight"] = rng.normal(0, 0.1, shape).astype(np.float32)
    return tensors


def merge(model: PreTrainedModel, spec: LoraSpec, tensors: Tensors) -> None:
    """The dense reference: W + alpha / rank * B A (or / sqrt(rank)), written out here and not taken from the code."""
    factor = spec.alpha / (np.sqrt(spec.rank) if spec.use_rslora else spec.rank)
    for name in tensors:
        if name.endswith(".lora_A.weight"):
            path = name.removesuffix(".lora_A.weight")
            delta = factor * tensors[f"{path}.lora_B.weight"].astype(np.float64) @ tensors[name].astype(np.float64)
            weight = model.get_parameter(f"{path}.weight")
            weight.data.add_(torch.from_numpy(delta).float())


def logits(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        return model(input_ids=ids).logits  # type: ignore[no-any-return]


def save(folder: Path, spec: LoraSpec, tensors: Tensors, dtype: torch.dtype = torch.float32) -> None:
    save_peft(folder, spec=spec, tensors=tensors, base_model="some/model", dtype=dtype)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize(
    "spec",
    [
        LoraSpec(rank=4, alpha=8.0),
        LoraSpec(rank=3, alpha=7.5, targets=("q_proj", "v_proj"), use_rslora=True, dropout=0.1),
    ],
)
def test_peft_loads_our_folder_and_gives_the_dense_reference(family: str, spec: LoraSpec, tmp_path: Path) -> None:
    model = tiny(family)
    base = logits(model)
    tensors = random_factors(model, spec)
    save(tmp_path / "adapter", spec, tensors)
    adapted = PeftModel.from_pretrained(model, str(tmp_path / "adapter"))
    reference = tiny(family)
    merge(reference, spec, tensors)
    assert (logits(adapted) - logits(reference)).abs().max() <= 1e-5
    assert (logits(reference) - base).abs().max() > 0.01


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("targets", [list(TARGETS), ["down_proj", "q_proj"], "all-linear", r".*\.(k|up)_proj"])
def test_we_load_what_peft_saves(family: str, targets: Any, tmp_path: Path) -> None:
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=targets, init_lora_weights=False, use_rslora=True, task_type="CAUSAL_LM"
    )
    adapted = get_peft_model(tiny(family), config)
    adapted.save_pretrained(str(tmp_path))
    spec, tensors = load_peft(tmp_path)
    assert (spec.rank, spec.alpha, spec.use_rslora) == (4, 6.0, True)
    reference = tiny(family)
    merge(reference, spec, tensors)
    assert (logits(adapted.eval()) - logits(reference)).abs().max() <= 1e-5
    assert {name.split(".lora_")[0].rsplit(".")[-1] for name in tensors} == set(spec.targets)
    assert len(tensors) == 2 * 2 * len(spec.targets)


def test_a_round_trip_in_float32_is_exact_and_in_bfloat16_rounds(tmp_path: Path) -> None:
    spec = LoraSpec(rank=4, alpha=10.0, targets=("o_proj", "k_proj"), dropout=0.25, use_rslora=True)
    tensors = random_factors(tiny(), spec)
    save(tmp_path / "a", spec, tensors)
    loaded_spec, loaded = load_peft(tmp_path / "a")
    assert loaded_spec == spec
    assert loaded.keys() == tensors.keys()
    assert all(np.array_equal(loaded[name], tensors[name]) for name in tensors)
    save(tmp_path / "b", spec, tensors, torch.bfloat16)
    rounded = load_peft(tmp_path / "b")[1]
    assert all(np.array_equal(rounded[n], torch.from_numpy(tensors[n]).bfloat16().float().numpy()) for n in tensors)


def test_equal_adapters_are_equal_bytes(tmp_path: Path) -> None:
    spec = LoraSpec(rank=2)
    tensors = random_factors(tiny(), spec)
    save(tmp_path / "a", spec, tensors)
    save(tmp_path / "b", spec, dict(reversed(tensors.items())))
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_an_export_replaces_an_adapter_and_nothing_else(tmp_path: Path) -> None:
    spec = LoraSpec(rank=2, targets=("q_proj",))
    tensors = random_factors(tiny(), spec)
    save(tmp_path / "a", spec, tensors)
    doubled = {name: 2 * value for name, value in tensors.items()}
    save(tmp_path / "a", spec, doubled)
    assert np.array_equal(load_peft(tmp_path / "a")[1][next(iter(doubled))], next(iter(doubled.values())))
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("precious")
    with pytest.raises(StorageError, match="thesis exists and is not an adapter"):
        save(tmp_path / "thesis", spec, tensors)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "thesis"]


@contextmanager
def file_size_limit(num_bytes: int) -> Iterator[None]:
    """Writes past the limit fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


@pytest.mark.parametrize("room", [100, 20_000])
def test_a_full_disk_leaves_the_old_adapter_and_no_rest(tmp_path: Path, room: int) -> None:
    spec = LoraSpec(rank=16)
    tensors = random_factors(tiny(), spec)
    save(tmp_path / "a", spec, tensors)
    before = {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}
    with file_size_limit(room), pytest.raises(StorageError, match="GiB free there"):
        save(tmp_path / "a", spec, {name: 2 * value for name, value in tensors.items()})
    with file_size_limit(room), pytest.raises(StorageError, match="GiB free there"):
        save(tmp_path / "new", spec, tensors)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()} == before


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_dora", True),
        ("modules_to_save", ["lm_head"]),
        ("rank_pattern", {"q_proj": 8}),
        ("alpha_pattern", {"q_proj": 8}),
        ("layers_to_transform", [0]),
        ("bias", "all"),
        ("lora_bias", True),
        ("fan_in_fan_out", True),
        ("init_lora_weights", "pissa"),
        ("trainable_token_indices", [1]),
        ("target_parameters", ["mlp.experts.gate_up_proj"]),
        ("task_type", "SEQ_CLS"),
        ("peft_type", "IA3"),
        ("a_field_of_the_future", 3),
        ("target_modules", ["q_proj", "lm_head"]),
        ("target_modules", ["embed_tokens"]),
        ("target_modules", []),
        ("r", "four"),
    ],
)
def test_what_cannot_be_served_is_refused_by_field(tmp_path: Path, field: str, value: Any) -> None:
    spec = LoraSpec(rank=2, targets=("q_proj",))
    save(tmp_path / "a", spec, random_factors(tiny(), spec))
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(AdapterError, match=f"{field}=") as caught:
        load_peft(tmp_path / "a")
    assert "adapter_config.json" in str(caught.value)


def test_peft_without_a_default_field_value_is_still_plain(tmp_path: Path) -> None:
    spec = LoraSpec(rank=2, targets=("q_proj",))
    save(tmp_path / "a", spec, random_factors(tiny(), spec))
    path = tmp_path / "a" / "adapter_config.json"
    keep = ("r", "lora_alpha", "target_modules", "peft_type")  # as old versions of PEFT wrote it
    path.write_text(json.dumps({name: json.loads(path.read_text())[name] for name in keep}))
    assert load_peft(tmp_path / "a")[0] == spec


def test_missing_damaged_and_alien_tensors_are_refused_by_name(tmp_path: Path) -> None:
    spec = LoraSpec(rank=2, targets=("q_proj",))
    tensors = random_factors(tiny(), spec)
    save(tmp_path / "a", spec, tensors)
    path = tmp_path / "a" / "adapter_model.safetensors"
    good, stored = path.read_bytes(), load_file(path)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    changes: list[tuple[dict[str, torch.Tensor], str]] = [
        ({k: v for k, v in stored.items() if k != key}, r"without 'model\.layers\.0\.self_attn\.q_proj\.lora_A"),
        ({**stored, key: torch.zeros(3, 64)}, r"q_proj\.lora_A\.weight' has shape \[3, 64\]; rank 2 needs \[2, in\]"),
        ({**stored, "base_model.model.lm_head.lora_A.weight": torch.zeros(2, 64)}, "lm_head"),
        ({**stored, key.replace("lora_A.weight", "lora_magnitude_vector"): torch.zeros(64)}, "lora_magnitude_vector"),
        ({k.replace("q_proj", "k_proj"): v for k, v in stored.items()}, r"\['k_proj'\].*\['q_proj'\]"),
        ({"plain": torch.zeros(1)}, "base_model.model"),
    ]
    for changed, message in changes:
        save_file(changed, path)
        with pytest.raises(AdapterError, match=message):
            load_peft(tmp_path / "a")
    path.write_bytes(good[:-10])
    with pytest.raises(AdapterError, match=r"adapter_model\.safetensors: damaged"):
        load_peft(tmp_path / "a")
    path.unlink()
    with pytest.raises(AdapterError, match=r"adapter_model\.safetensors does not exist"):
        load_peft(tmp_path / "a")
    with pytest.raises(AdapterError, match=r"nowhere.*adapter_config\.json"):
        load_peft(tmp_path / "nowhere")


def test_saving_what_is_not_of_the_spec_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    tensors = random_factors(tiny(), LoraSpec(rank=2, targets=("q_proj", "v_proj")))
    with pytest.raises(AdapterError, match=r"\['q_proj', 'v_proj'\]"):
        save(tmp_path / "a", LoraSpec(rank=2, targets=("q_proj",)), tensors)
    with pytest.raises(AdapterError, match="rank 3 needs"):
        save(tmp_path / "a", LoraSpec(rank=3, targets=("q_proj", "v_proj")), tensors)
    assert list(tmp_path.iterdir()) == []
