"""What every layout (TP 1, TP 2, TP 2 with sequence parallelism, DP 2) is put through; runs on each rank.

The functions return plain tensors; the parent process compares them with the reference. Nothing here asserts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from framework.algorithms.base import Aggregation, LossFn, LossInputs, LossOutput
from framework.batching import Batch, aggregate, pack, shift
from framework.device import Device, open_device
from framework.distributed import Mesh, open_mesh
from framework.lora.spec import TARGETS, LoraSpec
from framework.models.spec import read_spec
from framework.models.weights import load_shard
from framework.trainer.base import ForwardBackwardResult
from framework.trainer.megatron.trainer import RECOMPUTE, MegatronTrainer
from framework.types import AdamParams, Datum
from tests.tiny_models import VOCAB_SIZE
from tests.trainer.reference import ENTROPY_BONUS, Factors

TEMPERATURE = 0.7
SEQUENCE = torch.randint(0, VOCAB_SIZE, (48,), generator=torch.Generator().manual_seed(0))
"""Even, so that two ranks can split it."""
FIVE_STEPS = AdamParams(learning_rate=2e-3, weight_decay=0.1, max_grad_norm=0.3)
RSLORA = LoraSpec(rank=5, alpha=11.0, use_rslora=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientCase:
    """One adapter on one model."""

    variant: str
    targets: tuple[str, ...]
    factors: Factors = field(repr=False)

    @property
    def spec(self) -> LoraSpec:
        return LoraSpec(rank=4, alpha=10.0, targets=self.targets)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepsCase:
    """Five optimizer steps of one model."""

    variant: str
    factors: Factors = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Everything a layout is put through."""

    folders: dict[str, Path]
    gradients: tuple[GradientCase, ...]
    steps: tuple[StepsCase, ...]
    batches: tuple[tuple[Datum, ...], ...] = field(repr=False)
    """Five; the first serves wherever one is enough."""


def policy_loss(inputs: LossInputs) -> LossOutput:
    """-logprob * advantage with an entropy bonus."""
    return LossOutput(per_token=-inputs.logprobs * inputs.advantages - ENTROPY_BONUS * inputs.entropy)


def open_trainer(
    folder: Path,
    mesh: Mesh,
    device: Device,
    *,
    dtype: torch.dtype = torch.float32,
    sequence_parallel: bool = False,
    recompute: str = "none",
) -> MegatronTrainer:
    """The trainer of one checkpoint on this rank."""
    spec = read_spec(folder)
    weights = load_shard(
        folder, spec, tp_rank=mesh.tp_rank, tp_size=mesh.tp_size, dtype=dtype, device=device.torch_device
    )
    return MegatronTrainer(
        spec,
        weights,
        mesh=mesh,
        device=device,
        dtype=dtype,
        sequence_parallel=sequence_parallel,
        recompute=recompute,
    )


def make_batch(
    datums: Sequence[Datum],
    trainer: MegatronTrainer,
    *,
    max_tokens: int = 40,
    aggregation: Aggregation = "token_mean",
) -> Batch:
    """This replica's share of the datums (every dp-th), weighted by the global batch."""
    mesh = trainer.mesh
    share = [shift(datum) for datum in datums[mesh.dp_rank :: mesh.dp_size]]
    weighted = aggregate(share, aggregation, constant=7.0, global_sum=lambda value: mesh.global_sum([value])[0])
    return pack(weighted, max_tokens=max_tokens, multiple_of=trainer.token_multiple, temperature=TEMPERATURE)


def add(trainer: MegatronTrainer, name: str, spec: LoraSpec, factors: Factors) -> None:
    """An adapter with given factors."""
    trainer.add_adapter(name, spec, seed=3)
    trainer.import_adapter(name, factors)


def partial_gradient(trainer: MegatronTrainer, name: str) -> dict[str, Tensor]:
    """The accumulated gradient by PEFT's names: split factors whole, replicated ones this rank's part of the sum.

    Reads it through the Protocol: the gradient takes the masters' place for the length of an export.
    """
    saved = trainer.state_dict(name)
    trainer.load_state_dict(name, {**saved, "master": saved["grad"]})
    exported = {key: torch.from_numpy(value.copy()) for key, value in trainer.export_adapter(name).items()}
    trainer.load_state_dict(name, saved)
    return exported


def exported(trainer: MegatronTrainer, name: str) -> dict[str, Tensor]:
    """The whole factors as tensors."""
    return {key: torch.from_numpy(value.copy()) for key, value in trainer.export_adapter(name).items()}


def step_result(trainer: MegatronTrainer, name: str, batch: Batch, loss_fn: LossFn = policy_loss) -> dict[str, Any]:
    """One forward_backward: its loss, per-token results and gradient, which is cleared again."""
    result: ForwardBackwardResult = trainer.forward_backward(name, batch, loss_fn)
    gradient = partial_gradient(trainer, name)
    trainer.zero_grad(name)
    return {
        "loss": result.loss,
        "gradient": gradient,
        "logprobs": [torch.from_numpy(x) for x in result.result.logprobs],
        "entropy": [torch.from_numpy(x) for x in result.result.entropy],
        "num_microbatches": len(batch.microbatches),
    }


def parity(work: Workload, mesh: Mesh, device: Device, *, sequence_parallel: bool) -> dict[str, Any]:
    """Logits, gradients and five steps of every case."""
    results: dict[str, Any] = {"logits": {}, "adapter_logits": {}, "gradients": {}, "steps": {}, "fresh": {}}
    for variant, folder in work.folders.items():
        trainer = open_trainer(folder, mesh, device, sequence_parallel=sequence_parallel)
        results["logits"][variant] = trainer.logits(None, SEQUENCE)
        for case in (c for c in work.gradients if c.variant == variant):
            name = "+".join(case.targets)
            add(trainer, name, case.spec, case.factors)
            results["adapter_logits"][variant, case.targets] = trainer.logits(name, SEQUENCE)
            batch = make_batch(work.batches[0], trainer)
            results["gradients"][variant, case.targets] = step_result(trainer, name, batch)
            trainer.remove_adapter(name)
        for steps in (c for c in work.steps if c.variant == variant):
            add(trainer, "steps", RSLORA, steps.factors)
            results["steps"][variant] = five_steps(trainer, "steps", work)
        trainer.add_adapter("fresh", LoraSpec(rank=3), seed=11)
        results["fresh"][variant] = exported(trainer, "fresh")
    return results


def five_steps(trainer: MegatronTrainer, name: str, work: Workload) -> dict[str, Any]:
    """Losses and gradient norms of one AdamW step per batch, and the factors after them."""
    losses, norms = [], []
    for datums in work.batches:
        losses.append(trainer.forward_backward(name, make_batch(datums, trainer), policy_loss).loss)
        norms.append(trainer.optim_step(name, FIVE_STEPS).grad_norm)
    shards = {path: (s.a.clone(), s.b.clone()) for path, s in trainer.adapter_shards(name).items()}
    return {"losses": losses, "norms": norms, "factors": exported(trainer, name), "shards": shards}


def invariances(work: Workload, mesh: Mesh, device: Device) -> dict[str, Any]:
    """The same batch cut in different ways, for every aggregation; the same step in every recompute mode."""
    results: dict[str, Any] = {"split": {}, "recompute": {}, "dropout": {}}
    folder, factors = work.folders["qwen3"], next(c.factors for c in work.steps if c.variant == "qwen3")
    for recompute in RECOMPUTE:
        trainer = open_trainer(folder, mesh, device, sequence_parallel=mesh.tp_size > 1, recompute=recompute)
        add(trainer, "a", RSLORA, factors)
        results["recompute"][recompute] = step_result(trainer, "a", make_batch(work.batches[0], trainer))
        noisy = LoraSpec(rank=5, alpha=11.0, use_rslora=True, dropout=0.3)
        add(trainer, "noisy", noisy, factors)
        results["dropout"][recompute] = step_result(trainer, "noisy", make_batch(work.batches[0], trainer))
        if recompute == "none":
            aggregations: tuple[Aggregation, ...] = ("token_mean", "sequence_mean", "constant", "sum")
            batch = make_batch(work.batches[0], trainer)
            results["forward"] = {name: trainer.forward(name, batch).logprobs for name in ("a", "noisy")}
            for aggregation in aggregations:
                for max_tokens in (30, 46, 512):
                    batch = make_batch(work.batches[0], trainer, max_tokens=max_tokens, aggregation=aggregation)
                    results["split"][aggregation, max_tokens] = step_result(trainer, "a", batch)
    return results


def replicated_factors(work: Workload, mesh: Mesh, device: Device, dtype: torch.dtype) -> dict[str, Any]:
    """Five steps with dropout in ``dtype``; every rank returns the whole factors as it sees them."""
    trainer = open_trainer(work.folders["qwen2"], mesh, device, dtype=dtype, sequence_parallel=True)
    trainer.add_adapter("a", LoraSpec(rank=4, alpha=10.0, dropout=0.1), seed=7)
    return five_steps(trainer, "a", work)


def on_two_ranks(work: Workload) -> dict[str, Any]:
    """Everything that needs two ranks, in one launch."""
    device = open_device("cpu", local_rank=0)
    mesh = open_mesh(device, tensor_parallel_size=2, timeout_s=300.0)
    results: dict[str, Any] = {
        "tp2": parity(work, mesh, device, sequence_parallel=False),
        "tp2_sp": parity(work, mesh, device, sequence_parallel=True),
        "invariances_tp2": invariances(work, mesh, device),
        "replicated_bf16": replicated_factors(work, mesh, device, torch.bfloat16),
        "replicated_fp32": replicated_factors(work, mesh, device, torch.float32),
    }
    parallel_state.destroy_model_parallel()
    mesh = open_mesh(device, tensor_parallel_size=1, timeout_s=300.0)
    results["invariances_dp2"] = invariances(work, mesh, device)
    return results


def combine(parts: Sequence[dict[str, Tensor]], *, tp_size: int) -> dict[str, Tensor]:
    """The whole gradient from every rank's :func:`partial_gradient` (tensor-parallel or data-parallel ranks).

    Over data-parallel ranks everything is summed. Over tensor-parallel ranks the replicated factors are summed:
    A of q, k, v, gate and up, B of o and down; the rest is whole on each rank already.
    """
    whole = {}
    for key, tensor in parts[0].items():
        row_parallel = "o_proj" in key or "down_proj" in key
        replicated = ("lora_B" in key) if row_parallel else ("lora_A" in key)
        if tp_size > 1 and not replicated:
            whole[key] = tensor
        else:
            whole[key] = torch.stack([part[key].double() for part in parts]).sum(0)
    return whole


ALL_TARGETS = TARGETS
