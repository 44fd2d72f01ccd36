"""The start-up probe finds an engine that ignores, garbles or half-applies an adapter, and leaves nothing behind."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from framework.engine.base import SampleRequest
from framework.errors import DeliveryError
from framework.lora.spec import LoraSpec
from framework.probe import PROBE, ProbeResult, probe_delivery
from framework.trainer.base import LoraShard
from framework.types import AdapterRef
from framework.weight_sync import VersionCounter, WeightSync
from tests.service.toy import VOCAB, ToyEngine, ToyTrainer

SPEC = LoraSpec(rank=4, targets=("q_proj", "down_proj"), dropout=0.3)


class Trainer(ToyTrainer):
    """The toy trainer as the whole Protocol."""

    token_multiple = 1


class IgnoresAdapters(ToyEngine):
    """Answers every request with the base model."""

    def submit(self, request: SampleRequest) -> None:
        super().submit(replace(request, adapter=None))


class ScalesTwice(ToyEngine):
    """Serves the slot's B times two, which no comparison of slots sees."""

    def _column(self, token: int, ref: AdapterRef | None):  # type: ignore[no-untyped-def]
        if ref is None:
            return super()._column(token, ref)
        held = self.slots[ref]
        self.slots[ref] = {path: LoraShard(a=s.a, b=2 * s.b) for path, s in held.items()}
        try:
            return super()._column(token, ref)
        finally:
            self.slots[ref] = held


class OtherBase(ToyEngine):
    """Loaded another base model than the trainer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = self.table.flip(0)


def probe(engine: ToyEngine, trainer: Trainer | None = None) -> ProbeResult:
    trainer = trainer or Trainer()
    sync = WeightSync(
        trainer, engine, VersionCounter(), synchronize=lambda: None, check_lockstep=lambda what, value: None
    )
    try:
        return probe_delivery(trainer, engine, sync, SPEC, vocab_size=VOCAB, dtype=torch.float32)
    finally:
        assert PROBE not in trainer.adapters()
        assert engine.slots == {}
        assert engine.flights == {}
        assert sync.versions.last == 1


def test_a_sound_pair_agrees_to_rounding_and_the_adapter_shows() -> None:
    result = probe(ToyEngine())
    assert result.with_adapter < 1e-5
    assert result.without_adapter < 1e-5
    assert result.effect > 0.02
    assert result.tolerance == 0.003


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        (IgnoresAdapters(), "the engine ignores the adapter"),
        (ScalesTwice(), "with the adapter, engine and trainer give the same tokens logprobs that differ by"),
        (OtherBase(), "the adapter, engine and trainer give the same tokens logprobs that differ by"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_unsound_pair_ends_the_run(engine: ToyEngine, message: str) -> None:
    with pytest.raises(DeliveryError, match=f"startup-probe@1.*{message}"):
        probe(engine)


def test_the_random_state_of_the_run_is_left_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    probe(ToyEngine())
    assert torch.equal(torch.get_rng_state(), before)


def test_other_adapters_are_left_alone() -> None:
    trainer = Trainer()
    trainer.add_adapter("policy", SPEC, seed=1)
    before = {key: value.clone() for key, value in trainer.state_dict("policy").items()}
    probe(ToyEngine(), trainer)
    assert all(torch.equal(value, before[key]) for key, value in trainer.state_dict("policy").items())
