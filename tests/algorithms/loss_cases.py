"""Inputs for loss tests: small ones written by hand, and the recorded ones that peers were run on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from framework.algorithms.base import Aggregation, LossFn, LossInputs
from framework.batching import Example, aggregate

FIXTURES = Path(__file__).parent / "fixtures"


def by_hand(logprobs: Sequence[Sequence[float]], **fields: Sequence[Sequence[float]]) -> LossInputs:
    """float64 inputs of ragged sequences, weights 1, logprobs with gradient; entropy 0 unless it is a field."""
    sequence_ids = [index for index, row in enumerate(logprobs) for _ in row]
    flat = {name: torch.tensor([x for row in rows for x in row], dtype=torch.float64) for name, rows in fields.items()}
    leaf = torch.tensor([x for row in logprobs for x in row], dtype=torch.float64, requires_grad=True)
    return LossInputs(
        logprobs=leaf,
        entropy=flat.pop("entropy", torch.zeros_like(leaf).detach()),
        weights=torch.ones(len(sequence_ids), dtype=torch.float64),
        sequence_ids=torch.tensor(sequence_ids, dtype=torch.int64),
        num_sequences=len(logprobs),
        fields=flat,
    )


def value_and_gradient(loss_fn: LossFn, inputs: LossInputs) -> tuple[list[float], list[float]]:
    """Per-token losses, and the gradient of their weighted sum with respect to the logprobs."""
    per_token = loss_fn(inputs).per_token
    (gradient,) = torch.autograd.grad((per_token * inputs.weights).sum(), inputs.logprobs)
    return per_token.tolist(), gradient.tolist()


def assert_loss(loss_fn: LossFn, inputs: LossInputs, *, loss: Sequence[float], gradient: Sequence[float]) -> None:
    """Per-token losses and the gradient of their sum are these numbers, to a relative 1e-6."""
    ours = value_and_gradient(loss_fn, inputs)
    assert ours[0] == pytest.approx(loss)
    assert ours[1] == pytest.approx(gradient)


def peer(package: str) -> Mapping[str, Mapping[str, Any]]:
    """What another project's functions returned, by case; see ``fixtures/record_<package>.py``."""
    cases: Mapping[str, Mapping[str, Any]] = json.loads((FIXTURES / f"{package}.json").read_text())["cases"]
    return cases


def recorded() -> dict[str, Tensor]:
    """The inputs that the peers were run on, float64: ``[6, 6]`` per token, ``[6]`` per completion."""
    record = json.loads((FIXTURES / "inputs.json").read_text())
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in record.items()}


def recorded_inputs(aggregation: Aggregation, *, fields: Sequence[str] = ("proximal_logprobs",)) -> LossInputs:
    """The recorded batch with weights by ``batching.aggregate`` (constant 6), the named fields and the advantages."""
    record = recorded()
    mask = record["mask"].bool()
    lengths = mask.sum(1).tolist()
    examples = [
        Example(
            input_ids=np.zeros(n, dtype=np.int64),
            scored=np.arange(n),
            target_ids=np.zeros(n, dtype=np.int64),
            weights=np.ones(n, dtype=np.float32),
        )
        for n in lengths
    ]
    weights = np.concatenate([example.weights for example in aggregate(examples, aggregation, constant=6.0)])
    return LossInputs(
        logprobs=record["logprobs"][mask].requires_grad_(True),
        entropy=record["entropy"][mask],
        weights=torch.from_numpy(weights).double(),
        sequence_ids=torch.repeat_interleave(torch.arange(6), torch.tensor(lengths)),
        num_sequences=6,
        fields={
            "advantages": torch.repeat_interleave(record["advantages"], torch.tensor(lengths)),
            **{name: record[name][mask] for name in fields},
        },
    )


def assert_same_as(case: Mapping[str, Any], loss_fn: LossFn, inputs: LossInputs, *, tolerance: float = 2e-7) -> None:
    """The weighted sum and its gradient equal what a peer returned (our weights are float32, hence the tolerance)."""
    mask = recorded()["mask"].bool()
    total = (loss_fn(inputs).per_token * inputs.weights).sum()
    (gradient,) = torch.autograd.grad(total, inputs.logprobs)
    expected = torch.tensor(case["gradient"], dtype=torch.float64)[mask]
    torch.testing.assert_close(total.item(), case["loss"], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(gradient, expected, rtol=tolerance, atol=tolerance)
