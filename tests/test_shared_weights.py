"""Pushes of full fine-tuning: versions, what the engine is told, and what is noticed."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from framework.errors import DeliveryError
from framework.shared_weights import SharedWeights, fingerprint
from framework.types import AdapterRef
from framework.weight_sync import VersionCounter


class Holder:
    """A trainer and an engine, as far as the push knows them, around given tensors."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self.weights = dict(weights)
        self.adopted: list[AdapterRef] = []

    def base_weights(self) -> Mapping[str, Tensor]:
        return self.weights

    def adopt_weights(self, ref: AdapterRef) -> None:
        self.adopted.append(ref)


def make(trainer: Holder, engine: Holder, agreed: list[tuple[str, object]]) -> SharedWeights:
    return SharedWeights(
        trainer,  # type: ignore[arg-type]
        engine,  # type: ignore[arg-type]
        VersionCounter(last=4),
        synchronize=lambda: None,
        check_lockstep=lambda what, value: agreed.append((what, value)),
    )


def pair() -> tuple[Holder, Holder]:
    """Both sides with the same memory, as runtime.open_shared makes them: tensors of their own, aliased."""
    weights = {"a": torch.arange(6.0).view(2, 3).bfloat16(), "b": torch.ones(4).bfloat16()}
    return Holder(weights), Holder({name: tensor.data for name, tensor in weights.items()})


def test_a_push_is_the_next_version_and_the_engine_serves_it() -> None:
    trainer, engine = pair()
    agreed: list[tuple[str, object]] = []
    sync = make(trainer, engine, agreed)
    first, second = sync.push("policy"), sync.push("policy")
    assert [(ref.name, ref.version) for ref in (first, second)] == [("policy", 5), ("policy", 6)]
    assert first.content_hash == second.content_hash
    assert engine.adopted == [first, second]
    assert agreed == [("push", ("policy", 5)), ("push", ("policy", 6))]


def test_a_step_without_a_push_and_a_write_from_elsewhere_are_noticed() -> None:
    trainer, engine = pair()
    sync = make(trainer, engine, [])
    ref = sync.push("policy")
    sync.verify(ref)
    engine.weights["b"][2] = 1.5
    with pytest.raises(DeliveryError, match="policy@5: the weights have changed since they were pushed"):
        sync.verify(ref)
    sync.verify(sync.push("policy"))


def test_weights_that_are_not_the_engines_are_refused_by_name() -> None:
    trainer, engine = pair()
    engine.weights["b"] = engine.weights["b"].clone()
    with pytest.raises(DeliveryError, match="b: the trainer's tensor is not the engine's"):
        make(trainer, engine, []).push("policy")
    del engine.weights["b"]
    with pytest.raises(DeliveryError, match="b: the trainer's tensor is not the engine's"):
        make(trainer, engine, []).push("policy")
    assert engine.adopted == []


def test_the_fingerprint_sees_one_ulp_of_one_element() -> None:
    weights = {"w": torch.full((64, 64), 0.02, dtype=torch.bfloat16)}
    before = fingerprint(weights)
    assert fingerprint({"w": weights["w"].clone()}) == before
    weights["w"].view(torch.int16)[3, 5] += 1
    assert fingerprint(weights) != before
    assert fingerprint({"v": weights["w"]}) != fingerprint(weights)
