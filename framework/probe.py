"""The start-up probe: an adapter with random factors must change the engine exactly as it changes the trainer.

At initialisation B is zero, so an engine that ignores adapters altogether looks right until training has gone on for
a while. The probe pushes an adapter with a random B, scores the same tokens four ways (engine and trainer, with the
adapter and without) and removes it again. It takes two short prompts and no random state of the run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from framework.batching import make_batch
from framework.engine.base import RolloutEngine, SampleRequest, generate
from framework.errors import DeliveryError
from framework.lora.spec import LoraSpec
from framework.trainer.base import Trainer
from framework.types import AdapterRef, Datum, Prompt, SamplingParams
from framework.weight_sync import WeightSync

PROBE = "startup-probe"
"""Name of the adapter; it exists only while the probe runs."""
NUM_PROMPT_TOKENS, NUM_SAMPLED_TOKENS = 24, 6
EFFECT = 0.3
"""Size of what the adapter adds to a projection's output, for an input of size 1."""
TOLERANCES = {torch.float32: 0.003, torch.float16: 0.05, torch.bfloat16: 0.15}
"""Allowed mean |logprob difference| between engine and trainer, in nats. fp32 sees 1e-6, bf16 0.01 to 0.1."""
MIN_RATIO = 3.0
"""The adapter must change the logprobs by at least so many tolerances."""

Values = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeResult:
    """Mean |difference| of logprobs of the same tokens, in nats."""

    with_adapter: float
    """Engine to trainer, both with the adapter."""
    without_adapter: float
    """Engine to trainer, both without."""
    effect: float
    """Engine with the adapter to engine without."""
    tolerance: float


def probe_delivery(
    trainer: Trainer,
    engine: RolloutEngine,
    weight_sync: WeightSync,
    spec: LoraSpec,
    *,
    vocab_size: int,
    dtype: torch.dtype,
) -> ProbeResult:
    """Runs the probe. All ranks of the tensor-parallel group must call it.

    Args:
        trainer: gets an adapter :data:`PROBE` and loses it again.
        engine: needs one free slot.
        weight_sync: of both.
        spec: shape of the adapters of this run.
        vocab_size: prompts are random tokens below it.
        dtype: of the computation; decides the tolerance.

    Raises:
        DeliveryError: the engine ignores the adapter, or disagrees with the trainer with or without it.
    """
    trainer.add_adapter(PROBE, replace(spec, dropout=0.0), seed=0)
    try:
        _randomise(trainer, spec)
        ref = weight_sync.push(PROBE)
        try:
            result = _measure(trainer, engine, ref, vocab_size=vocab_size, tolerance=TOLERANCES[dtype])
        finally:
            weight_sync.release(PROBE)
    finally:
        trainer.remove_adapter(PROBE)
    _judge(result, ref)
    return result


def _randomise(trainer: Trainer, spec: LoraSpec) -> None:
    """B ~ N(0, s), s such that scale * B A x has size :data:`EFFECT`; Kaiming-uniform A have var 1/(3 in)."""
    rng = np.random.default_rng(0)
    std = EFFECT * (3.0 / spec.rank) ** 0.5 / spec.scale
    factors = trainer.export_adapter(PROBE)
    trainer.import_adapter(
        PROBE,
        {
            key: rng.normal(size=value.shape, scale=std).astype(np.float32) if "lora_B" in key else value
            for key, value in factors.items()
        },
    )


def _measure(
    trainer: Trainer, engine: RolloutEngine, ref: AdapterRef, *, vocab_size: int, tolerance: float
) -> ProbeResult:
    rng = np.random.default_rng(1)
    num_prompt_tokens = min(NUM_PROMPT_TOKENS, engine.max_prompt_tokens - NUM_SAMPLED_TOKENS - 1)
    prompts = [tuple(rng.integers(0, vocab_size, num_prompt_tokens).tolist()) for _ in range(2)]
    sampling = SamplingParams(max_tokens=NUM_SAMPLED_TOKENS, seed=0, ignore_eos=True)
    completions = generate(engine, [_request("sample", i, p, sampling, ref) for i, p in enumerate(prompts)])
    sequences = [p + c.token_ids for p, c in zip(prompts, completions, strict=True)]
    scoring = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=True)

    def by_engine(adapter: AdapterRef | None) -> Values:
        scored = generate(engine, [_request("score", i, s, scoring, adapter) for i, s in enumerate(sequences)])
        return np.array([value for c in scored for value in (c.prompt_logprobs or ())[1:]], dtype=np.float64)

    def by_trainer(name: str | None) -> Values:
        datums = [Datum(token_ids=s, loss_mask=(False, *(True,) * (len(s) - 1))) for s in sequences]
        batch = make_batch(
            datums,
            aggregation="sum",
            max_tokens=sum(map(len, sequences)),
            multiple_of=trainer.token_multiple,
        )
        return np.concatenate(trainer.forward(name, batch).logprobs).astype(np.float64)

    engine_with, engine_without = by_engine(ref), by_engine(None)
    trainer_with, trainer_without = by_trainer(PROBE), by_trainer(None)
    decoded = np.concatenate([c.sampling_logprobs for c in completions])
    at = np.concatenate([np.arange(len(s) - 1) >= num_prompt_tokens - 1 for s in sequences])
    return ProbeResult(
        with_adapter=max(_distance(engine_with, trainer_with), _distance(decoded, trainer_with[at])),
        without_adapter=_distance(engine_without, trainer_without),
        effect=_distance(engine_with, engine_without),
        tolerance=tolerance,
    )


def _request(
    what: str, index: int, tokens: Sequence[int], sampling: SamplingParams, ref: AdapterRef | None
) -> SampleRequest:
    request_id = f"{PROBE}/{what}/{ref}/{index}"
    return SampleRequest(request_id=request_id, prompt=Prompt(token_ids=tuple(tokens)), sampling=sampling, adapter=ref)


def _distance(first: Values, second: Values) -> float:
    return float(np.abs(first - second).mean())


def _judge(result: ProbeResult, ref: AdapterRef) -> None:
    tolerance = result.tolerance
    advice = "the start-up probe ends the run rather than train on samples of another model (parity.probe)"
    if not result.effect >= MIN_RATIO * tolerance:
        raise DeliveryError(
            f"{ref} with a random B changes the engine's logprobs by {result.effect:.3g} only, at least "
            f"{MIN_RATIO * tolerance:.3g} was expected: the engine ignores the adapter; {advice}"
        )
    for what, value in (("with", result.with_adapter), ("without", result.without_adapter)):
        if not value <= tolerance:
            raise DeliveryError(
                f"{ref}: {what} the adapter, engine and trainer give the same tokens logprobs that differ by "
                f"{value:.3g}, more than {tolerance:.3g} (effect of the adapter: {result.effect:.3g}); {advice}"
            )
