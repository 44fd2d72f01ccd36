"""Binding weights: the very tensors, none forgotten, none changed by training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import Module

from framework.device import HOST, Device
from framework.distributed import Mesh
from framework.lora.spec import LoraSpec
from framework.models.spec import read_spec
from framework.models.weights import load_shard
from framework.trainer.megatron.trainer import MegatronTrainer
from framework.types import AdamParams
from tests.tiny_models import VARIANTS, VOCAB_SIZE
from tests.trainer.megatron.scenario import make_batch, policy_loss
from tests.trainer.reference import make_datums


def load(folder: Path) -> dict[str, torch.Tensor]:
    return load_shard(folder, read_spec(folder), tp_rank=0, tp_size=1, dtype=torch.float32, device=HOST)


def build(folder: Path, weights: dict[str, torch.Tensor], mesh: Mesh, device: Device) -> MegatronTrainer:
    return MegatronTrainer(
        read_spec(folder),
        weights,
        mesh=mesh,
        device=device,
        dtype=torch.float32,
        sequence_parallel=False,
        recompute="none",
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_model_holds_these_very_tensors(variant: str, tiny: dict[str, Path], mesh: Mesh, device: Device) -> None:
    weights = load(tiny[variant])
    trainer = build(tiny[variant], weights, mesh, device)
    model: Module = trainer._model
    held = {t.data_ptr() for t in (*model.parameters(), *model.buffers())} | {trainer._vocab.weight.data_ptr()}
    assert held == {tensor.data_ptr() for tensor in weights.values()}
    assert all(not parameter.requires_grad for parameter in model.parameters())


def test_training_does_not_change_the_base(tiny: dict[str, Path], mesh: Mesh, device: Device) -> None:
    weights = load(tiny["qwen2"])
    before = {name: tensor.clone() for name, tensor in weights.items()}
    trainer = build(tiny["qwen2"], weights, mesh, device)
    trainer.add_adapter("a", LoraSpec(rank=4), seed=1)
    batch = make_batch(make_datums(VOCAB_SIZE), trainer)
    base = [x.tolist() for x in trainer.forward(None, batch).logprobs]
    for _ in range(2):
        trainer.forward_backward("a", batch, policy_loss)
        trainer.optim_step("a", AdamParams(learning_rate=0.1))
    assert all(torch.equal(weights[name], before[name]) for name in before)
    assert [x.tolist() for x in trainer.forward(None, batch).logprobs] == base
    assert [x.tolist() for x in trainer.forward("a", batch).logprobs] != base


@pytest.mark.parametrize(
    "name", ["model.layers.1.self_attn.q_norm.weight", "model.layers.0.mlp.down_proj.weight", "model.norm.weight"]
)
def test_a_forgotten_weight_is_caught(name: str, tiny: dict[str, Path], mesh: Mesh, device: Device) -> None:
    weights = load(tiny["qwen3"])
    del weights[name]
    with pytest.raises((AssertionError, KeyError), match=r"norm|down_proj"):
        build(tiny["qwen3"], weights, mesh, device)


def test_a_weight_without_a_place_is_caught(tiny: dict[str, Path], mesh: Mesh, device: Device) -> None:
    weights = load(tiny["llama"])
    weights["model.layers.0.self_attn.q_norm.weight"] = torch.ones(16)
    with pytest.raises(AttributeError, match="q_norm"):
        build(tiny["llama"], weights, mesh, device)
