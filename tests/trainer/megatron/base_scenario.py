"""Full fine-tuning of tiny models on one or two ranks; test_base_state.py compares with transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from framework.device import Device, open_device
from framework.distributed import Mesh, open_mesh
from framework.types import AdamParams, Datum
from tests.trainer.megatron.scenario import SEQUENCE, make_batch, open_trainer, policy_loss

FIVE_STEPS = AdamParams(learning_rate=1e-3, weight_decay=0.01, max_grad_norm=0.5)
Batches = Sequence[Sequence[Datum]]


def train(
    folder: Path, batches: Batches, mesh: Mesh, device: Device, *, sequence_parallel: bool, recompute: str = "none"
) -> dict[str, Any]:
    """One AdamW step per batch: losses, gradient norms, and the model before and after."""
    trainer = open_trainer(folder, mesh, device, sequence_parallel=sequence_parallel, recompute=recompute)
    addresses = {name: tensor.data_ptr() for name, tensor in trainer.base_weights().items()}
    before = trainer.logits(None, SEQUENCE)
    trainer.train_base("policy")
    losses, norms = [], []
    for datums in batches:
        losses.append(trainer.forward_backward("policy", make_batch(datums, trainer), policy_loss).loss)
        norms.append(trainer.optim_step("policy", FIVE_STEPS).grad_norm)
    return {
        "losses": losses,
        "norms": norms,
        "before": before,
        "after": trainer.logits("policy", SEQUENCE),
        "model": dict(trainer.export_base("policy")),
        "in place": addresses == {name: tensor.data_ptr() for name, tensor in trainer.base_weights().items()},
        "left over": [name for name, tensor in trainer.base_weights().items() if tensor.grad is not None],
    }


def on_two_ranks(folders: dict[str, Path], batches: Batches) -> dict[str, Any]:
    """Tensor parallelism, with and without sequence parallelism."""
    device = open_device("cpu", local_rank=0)
    mesh = open_mesh(device, tensor_parallel_size=2, timeout_s=120.0)
    return {
        (variant, sequence_parallel): train(folder, batches, mesh, device, sequence_parallel=sequence_parallel)
        for variant, folder in folders.items()
        for sequence_parallel in (False, True)
    }


def resumed(folder: Path, batches: Batches, mesh: Mesh, device: Device) -> dict[str, torch.Tensor]:
    """Three steps, saved with a gradient half accumulated, taken up by another trainer that goes on."""
    first = open_trainer(folder, mesh, device)
    first.train_base("policy")
    for datums in batches[:2]:
        first.forward_backward("policy", make_batch(datums, first), policy_loss)
        first.optim_step("policy", FIVE_STEPS)
    first.forward_backward("policy", make_batch(batches[2], first), policy_loss)
    second = open_trainer(folder, mesh, device)
    second.train_base("policy")
    second.load_state_dict("policy", first.state_dict("policy"))
    for trainer in (first, second):
        trainer.optim_step("policy", FIVE_STEPS)
        trainer.forward_backward("policy", make_batch(batches[3], trainer), policy_loss)
        trainer.optim_step("policy", FIVE_STEPS)
    return {"first": dict(first.export_base("policy")), "second": dict(second.export_base("policy"))}
