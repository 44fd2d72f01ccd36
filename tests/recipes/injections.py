"""Faults put between a real trainer and a real engine, and what they end with; part of scenario.py's launch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from framework.batching import make_batch
from framework.config import RunConfig
from framework.engine.base import SampleRequest, generate
from framework.errors import FrameworkError
from framework.parity import check_parity, measure_parity
from framework.probe import ProbeResult, probe_delivery
from framework.runtime import SamplingRuntime
from framework.types import AdapterRef, Completion, Datum

MODULE = "model.layers.1.mlp.down_proj"


def injections(
    rt: SamplingRuntime, cfg: RunConfig, requests: Sequence[SampleRequest], *, randomise: Callable[[int], None]
) -> dict[str, str | None]:
    """The error of each fault, or None where nothing happened. The adapter is named ``probe``."""
    seen: dict[str, str | None] = {"probe": _error(lambda: _probe(rt, rt.engine, cfg))}
    seen["engine_without_adapters"] = _error(lambda: _probe(rt, WithoutAdapters(rt.engine), cfg))
    randomise(50)
    ref = rt.weight_sync.push("probe")
    seen["as_pushed"] = _error(lambda: rt.weight_sync.verify(ref))
    bits = rt.engine.read_adapter(ref)[MODULE].b.view(torch.int32)
    bits[1, 2] ^= 1
    seen["bit_flipped"] = _error(lambda: rt.weight_sync.verify(ref))
    bits[1, 2] ^= 1
    _rebind(rt.engine, ref, to=ref.version + 1000)
    seen["slot_of_another"] = _error(lambda: rt.weight_sync.verify(ref))
    _rebind(rt.engine, ref, to=ref.version)
    datums = _sampled(rt, [replace(request, adapter=ref) for request in requests], ref)
    seen["gate_as_pushed"] = _error(lambda: _gate(rt, cfg, datums, temperature=0.7))
    seen["gate_raw_logprobs"] = _error(lambda: _gate(rt, cfg, datums, temperature=1.0))
    randomise(51)  # the trainer goes on without a push
    seen["push_skipped"] = _error(lambda: rt.weight_sync.verify(ref))
    seen["gate_stale_adapter"] = _error(lambda: _gate(rt, cfg, datums, temperature=0.7))
    return seen


class WithoutAdapters:
    """The same engine, answering every request with the base model, as one does that skips its LoRA kernels."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def submit(self, request: SampleRequest) -> None:
        self._engine.submit(replace(request, adapter=None))


def _probe(rt: SamplingRuntime, engine: Any, cfg: RunConfig) -> ProbeResult:
    spec = rt.base.spec
    return probe_delivery(rt.trainer, engine, rt.weight_sync, cfg.lora, vocab_size=spec.vocab_size, dtype=rt.base.dtype)


def _rebind(engine: Any, ref: AdapterRef, *, to: int) -> None:
    """Gives the slot to another id, as an eviction behind the engine's back would."""
    slot = engine._slot_of[ref.version]
    engine._slots.unbind(slot)
    engine._slots.bind(slot, to, engine._rank_of[ref.version].rank)


def _sampled(rt: SamplingRuntime, requests: Sequence[SampleRequest], ref: AdapterRef) -> list[Datum]:
    completions: Sequence[Completion] = generate(rt.engine, requests)
    return [
        Datum(
            token_ids=request.prompt.token_ids + c.token_ids,
            loss_mask=(False,) * len(request.prompt.token_ids) + (True,) * len(c.token_ids),
            fields={"sampling_logprobs": (0.0,) * len(request.prompt.token_ids) + c.sampling_logprobs},
            adapter=ref,
        )
        for request, c in zip(requests, completions, strict=True)
    ]


def _gate(rt: SamplingRuntime, cfg: RunConfig, datums: Sequence[Datum], *, temperature: float) -> None:
    batch = make_batch(
        datums, aggregation="sum", max_tokens=256, multiple_of=rt.trainer.token_multiple, temperature=temperature
    )
    check_parity(measure_parity(datums, rt.trainer.forward("probe", batch), rt.mesh), cfg.parity, step=7)


def _error(call: Callable[[], Any]) -> str | None:
    try:
        call()
    except FrameworkError as error:
        return f"{type(error).__name__}: {error}"
    return None
