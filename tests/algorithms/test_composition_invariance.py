"""Every loss's total and gradient are the same however a batch is packed, or split over data-parallel replicas.

The model is a toy that has what matters: logprobs and entropy of a softmax of ``embedding[input_ids]``, one matrix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from framework.algorithms.base import Aggregation, LossFn, LossInputs
from framework.algorithms.catalog import ALGORITHMS, build_algorithm
from framework.algorithms.composition import ComposedLoss, KLTerm
from framework.algorithms.corrections import (
    GeometricMask,
    IcePop,
    OffPolicyMask,
    SequenceMaskedImportance,
    TruncatedImportance,
)
from framework.algorithms.kl import k3
from framework.algorithms.losses import DRO, GSPO, GSPOToken, ImportanceSampling, PPOClip, Reinforce
from framework.algorithms.preference import DPO
from framework.algorithms.supervised import CrossEntropy, OnPolicyDistillation
from framework.algorithms.tinker import TINKER_LOSSES, tinker_loss
from framework.batching import Example, Microbatch, aggregate, pack, shift
from framework.metrics import check_metrics
from framework.types import Datum

VOCAB = 13
FIELDS = ("sampling_logprobs", "proximal_logprobs", "ref_logprobs", "teacher_logprobs")


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What a batch did: the sums the trainer makes."""

    total: float
    gradient: Tensor
    metrics: Mapping[str, float]


def make_datums() -> list[Datum]:
    """Eight datums of 5 to 17 tokens, logprob fields about 0.2 away from the toy's own, advantages of both signs."""
    rng = np.random.default_rng(7)
    logprobs = torch.log_softmax(make_weight(), -1).detach().numpy()
    datums = []
    for length in (9, 5, 17, 12, 7, 7, 15, 6):
        tokens = rng.integers(0, VOCAB, length)
        mask = np.arange(length) >= 2 + rng.integers(0, 2)
        base = np.concatenate([[0.0], logprobs[tokens[:-1], tokens[1:]]])
        fields = {name: tuple((base + rng.normal(0, 0.2, length)).tolist()) for name in FIELDS}
        fields["advantages"] = (float(rng.normal()),) * length
        fields["weights"] = tuple(rng.normal(0, 1, length).tolist())
        fields["sequence_ratio_mask"] = tuple((rng.random(length) < 0.7).astype(float).tolist())
        datums.append(Datum(token_ids=tuple(tokens.tolist()), loss_mask=tuple(mask.tolist()), fields=fields))
    return datums


def make_weight() -> Tensor:
    """``[VOCAB, VOCAB]`` float64 logits of the next token given this one."""
    return torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def toy_inputs(weight: Tensor, microbatch: Microbatch) -> LossInputs:
    logprobs = torch.log_softmax(weight[microbatch.input_ids[microbatch.scored]], -1)
    return LossInputs(
        logprobs=logprobs.gather(1, microbatch.target_ids[:, None])[:, 0],
        entropy=-(logprobs.exp() * logprobs).sum(-1),
        weights=microbatch.weights.double(),
        sequence_ids=microbatch.sequence_ids,
        num_sequences=microbatch.num_sequences,
        fields={name: value.double() for name, value in microbatch.fields.items()},
    )


def run(examples: Sequence[Example], loss_fn: LossFn, *, max_tokens: int, keep_together: int, multiple_of: int) -> Step:
    weight = make_weight().requires_grad_(True)
    batch = pack(examples, max_tokens=max_tokens, keep_together=keep_together, multiple_of=multiple_of)
    total, sums = 0.0, dict[str, float]()
    for microbatch in batch.microbatches:
        inputs = toy_inputs(weight, microbatch)
        output = loss_fn(inputs)
        loss = (output.per_token * inputs.weights).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.item()
        check_metrics({key: float(metric.sum) for key, metric in output.metrics.items()})
        for key, metric in output.metrics.items():
            sums[key] = sums.get(key, 0.0) + float(metric.sum)
            sums[f"{key}/count"] = sums.get(f"{key}/count", 0.0) + float(metric.count)
    assert weight.grad is not None
    return Step(total=total, gradient=weight.grad, metrics=sums)


def assert_same(a: Step, b: Step) -> None:
    assert a.total == pytest.approx(b.total, rel=1e-9, abs=1e-12)
    torch.testing.assert_close(a.gradient, b.gradient, rtol=1e-9, atol=1e-12)
    assert a.metrics == pytest.approx(b.metrics, rel=1e-9, abs=1e-9)


def composed(name: str) -> tuple[LossFn, Aggregation]:
    algorithm = build_algorithm(ALGORITHMS[name], max_tokens=32)
    return algorithm.loss, algorithm.aggregation


CASES: dict[str, tuple[LossFn, Aggregation]] = {
    **{name: composed(name) for name in ALGORITHMS},
    "gspo_wide": (GSPO(clip_low=0.05, clip_high=0.05), "sequence_mean"),
    "gspo_token": (GSPOToken(clip_low=0.05, clip_high=0.05), "token_mean"),
    "reinforce": (Reinforce(), "constant"),
    "importance_sampling": (ImportanceSampling(), "sum"),
    "dro": (DRO(beta=0.1), "token_mean"),
    "cross_entropy": (CrossEntropy(), "token_mean"),
    "distillation": (OnPolicyDistillation(), "token_mean"),
    "dpo": (DPO(beta=0.1), "sequence_mean"),
    **{
        correction.__class__.__name__: (
            ComposedLoss(policy=PPOClip(), correction=correction, kl=KLTerm(coef=0.1, estimator=k3), entropy_coef=0.01),
            "token_mean",
        )
        for correction in (
            TruncatedImportance(high=1.1),
            IcePop(low=0.9, high=1.1),
            SequenceMaskedImportance(low=0.5, high=2.0),
            GeometricMask(low=0.95, high=1.05),
            OffPolicyMask(high=0.02),
        )
    },
    **{
        f"tinker/{name}": (tinker_loss(name, fields=frozenset(loss.fields), config={}), "sum")
        for name, loss in TINKER_LOSSES.items()
    },
}


@pytest.mark.parametrize("name", CASES)
def test_packing_changes_nothing(name: str) -> None:
    loss_fn, aggregation = CASES[name]
    examples = aggregate([shift(datum) for datum in make_datums()], aggregation, constant=32.0)
    keep_together = 2 if name == "dpo" else 1
    whole = run(examples, loss_fn, max_tokens=1000, keep_together=keep_together, multiple_of=1)
    assert abs(whole.total) > 1e-4
    assert whole.gradient.abs().max() > 1e-4
    for max_tokens, multiple_of in ((30, 1), (41, 8), (1000, 8)):
        packed = run(examples, loss_fn, max_tokens=max_tokens, keep_together=keep_together, multiple_of=multiple_of)
        assert_same(packed, whole)


@pytest.mark.parametrize("name", CASES)
def test_data_parallel_split_changes_nothing(name: str) -> None:
    """Two replicas of unequal work; each divides by counts summed over both."""
    loss_fn, aggregation = CASES[name]
    sequences = [shift(datum) for datum in make_datums()]
    keep_together = 2 if name == "dpo" else 1
    whole = run(
        aggregate(sequences, aggregation, constant=32.0),
        loss_fn,
        max_tokens=1000,
        keep_together=keep_together,
        multiple_of=1,
    )
    count = float(sum(len(s.scored) for s in sequences) if aggregation == "token_mean" else len(sequences))
    parts = [
        run(
            aggregate(share, aggregation, constant=32.0, global_sum=lambda _: count),
            loss_fn,
            max_tokens=50,
            keep_together=keep_together,
            multiple_of=1,
        )
        for share in (sequences[:6], sequences[6:])
    ]
    both = Step(
        total=parts[0].total + parts[1].total,
        gradient=parts[0].gradient + parts[1].gradient,
        metrics={key: parts[0].metrics[key] + parts[1].metrics[key] for key in parts[0].metrics},
    )
    assert_same(both, whole)


def test_a_datum_without_trained_tokens_changes_nothing() -> None:
    """What the overlong filter leaves behind is in no denominator."""
    datums = make_datums()
    filtered = Datum(
        token_ids=datums[2].token_ids, loss_mask=(False,) * len(datums[2].token_ids), fields=datums[2].fields
    )
    loss_fn, _ = CASES["grpo"]
    for aggregation in ("token_mean", "sequence_mean", "constant"):
        with_it = aggregate([shift(d) for d in [*datums[:2], filtered, *datums[3:]]], aggregation, constant=32.0)
        without = aggregate([shift(d) for d in datums[:2] + datums[3:]], aggregation, constant=32.0)
        assert_same(
            run(with_it, loss_fn, max_tokens=20, keep_together=1, multiple_of=1),
            run(without, loss_fn, max_tokens=1000, keep_together=1, multiple_of=1),
        )
