"""The workload, its reference, and its results under every layout: one process here, one launch on two ranks."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from torch import Tensor, distributed

from framework.device import Device, open_device
from framework.distributed import Mesh, open_mesh
from framework.lora.spec import TARGETS, LoraSpec
from tests.ranks import run_ranks
from tests.tiny_models import VARIANTS, VOCAB_SIZE
from tests.trainer import reference
from tests.trainer.megatron import scenario
from tests.trainer.megatron.scenario import GradientCase, StepsCase, Workload

SUBSETS: dict[str, tuple[tuple[str, ...], ...]] = {
    "llama": (
        *((target,) for target in TARGETS),
        *itertools.combinations(("q_proj", "k_proj", "v_proj"), 2),
        ("gate_proj", "up_proj"),
        ("q_proj", "k_proj", "v_proj", "o_proj"),
        ("gate_proj", "up_proj", "down_proj"),
        ("k_proj", "o_proj", "up_proj", "down_proj"),
        TARGETS,
    ),
    "llama3_rope": (TARGETS,),
    "qwen2": (("q_proj", "v_proj"), ("k_proj", "o_proj", "up_proj"), TARGETS),
    "qwen3": (("q_proj", "v_proj"), ("k_proj", "o_proj", "up_proj"), TARGETS),
}
"""Projections with an adapter: each alone, every pair of the fused qkv, and mixtures."""
GRADIENT_KEYS = [(variant, targets) for variant, subsets in SUBSETS.items() for targets in subsets]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """What transformers and PEFT compute for the workload."""

    logits: dict[str, Tensor]
    adapter_logits: dict[Any, Tensor]
    gradients: dict[Any, reference.Outcome]
    steps: dict[str, tuple[list[float], list[float], dict[str, Tensor]]]
    rslora: reference.Outcome
    """The RSLORA adapter of qwen3 on the first batch."""


@pytest.fixture(scope="session")
def bases(tiny: dict[str, Path]) -> dict[str, Any]:
    """The transformers models by variant."""
    return {variant: reference.load(folder) for variant, folder in tiny.items()}


@pytest.fixture(scope="session")
def work(tiny: dict[str, Path], bases: dict[str, Any]) -> Workload:
    """What every layout is put through."""
    gradients = []
    for variant, targets in GRADIENT_KEYS:
        spec = LoraSpec(rank=4, alpha=10.0, targets=targets)
        factors = reference.make_factors(bases[variant], spec)
        gradients.append(GradientCase(variant=variant, targets=targets, factors=factors))
    steps = [
        StepsCase(variant=v, factors=reference.make_factors(bases[v], scenario.RSLORA, zero_b=v == "qwen2"))
        for v in VARIANTS
    ]
    batches = tuple(tuple(reference.make_datums(VOCAB_SIZE, seed=seed)) for seed in range(5))
    return Workload(folders=tiny, gradients=tuple(gradients), steps=tuple(steps), batches=batches)


@pytest.fixture(scope="session")
def expected(work: Workload, bases: dict[str, Any]) -> Reference:
    """The reference's results."""
    sequence = scenario.SEQUENCE[None]
    adapter_logits, gradients, steps = {}, {}, {}
    for case in work.gradients:
        model = reference.with_adapter(bases[case.variant], case.spec, case.factors)
        key = (case.variant, case.targets)
        with torch.no_grad():
            adapter_logits[key] = model(sequence).logits[0]
        gradients[key] = reference.forward_backward(
            model, list(case.factors), work.batches[0], temperature=scenario.TEMPERATURE
        )
    for c in work.steps:
        model = reference.with_adapter(bases[c.variant], scenario.RSLORA, c.factors)
        if c.variant == "qwen3":
            rslora = reference.forward_backward(
                model, list(c.factors), work.batches[0], temperature=scenario.TEMPERATURE
            )
        steps[c.variant] = reference.train(
            model, list(c.factors), work.batches, scenario.FIVE_STEPS, temperature=scenario.TEMPERATURE
        )
    with torch.no_grad():
        logits = {variant: base(sequence).logits[0] for variant, base in bases.items()}
    return Reference(logits=logits, adapter_logits=adapter_logits, gradients=gradients, steps=steps, rslora=rslora)


@pytest.fixture(scope="session")
def device() -> Device:
    return open_device("cpu", local_rank=0)


@pytest.fixture(scope="session")
def mesh(device: Device) -> Iterator[Mesh]:
    """A mesh of this process alone; what it set for torchrun's sake is taken back, children must not see it."""
    before = dict(os.environ)
    mesh = open_mesh(device, tensor_parallel_size=1, timeout_s=300.0)
    for key in set(os.environ) - set(before):
        del os.environ[key]
    yield mesh
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    distributed.destroy_process_group()


@pytest.fixture(scope="session")
def one_rank(work: Workload, mesh: Mesh, device: Device) -> dict[str, Any]:
    """The results in this process."""
    return {
        "tp1": scenario.parity(work, mesh, device, sequence_parallel=False),
        "invariances_tp1": scenario.invariances(work, mesh, device),
    }


@pytest.fixture(scope="session")
def two_ranks(work: Workload, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The results of each of two ranks."""
    folder = tmp_path_factory.mktemp("two_ranks")
    return run_ranks("tests.trainer.megatron.scenario:on_two_ranks", folder, timeout_s=500.0, work=work)


@pytest.fixture(scope="session")
def by_layout(one_rank: dict[str, Any], two_ranks: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Each layout's parity results, one per rank."""
    return {
        "tp1": [one_rank["tp1"]],
        "tp2": [rank["tp2"] for rank in two_ranks],
        "tp2_sp": [rank["tp2_sp"] for rank in two_ranks],
    }
