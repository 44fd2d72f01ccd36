"""What test_grpo_full.py runs: GRPO and SFT of every weight, in the tensors that the engine samples with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from framework.batching import make_batch
from framework.config import RunConfig
from framework.engine.base import SampleRequest, generate
from framework.errors import FrameworkError
from framework.runtime import (
    POLICY,
    SamplingRuntime,
    open_records,
    open_sampling,
    open_training,
)
from framework.shared_weights import SharedWeights, fingerprint
from framework.types import AdapterRef, Datum, Prompt, SamplingParams
from recipes import grpo, sft
from tests.recipes.scenario import PROMPTS, config

PLACES: dict[str, dict[str, Any]] = {
    "vllm": {"model__dtype": "bfloat16", "hardware__device": "cuda", "engine__enforce_eager": True},
    "trainer": {"engine__backend": "trainer"},
}
"""The engine of an accelerator, and sampling with the trainer's own model, which runs anywhere; fp32 there."""


def full(model: Path, run_dir: Path, place: str, **overrides: Any) -> RunConfig:
    """Every weight, three steps, a checkpoint after the second."""
    options: dict[str, Any] = {
        **PLACES[place],
        "lora": None,
        "num_steps": 3,
        "optimizer": {"learning_rate": 1e-3},
        "checkpoint": {"every": 2},
        "resume": "auto",
    }
    return config(model, run_dir, **{**options, **overrides})


def run_all(model: Path, rows: Path, run_dir: Path, place: str) -> dict[str, Any]:
    """Everything in one process, because starting the engine costs more than all that it is asked."""
    cfg = full(model, run_dir / "grpo", place)
    rt = open_sampling(cfg)
    seen: dict[str, Any] = {"start": probabilities(rt, None)}
    grpo.run(cfg, rt)
    parameters = sum(tensor.numel() for tensor in rt.trainer.base_weights().values())
    kept = sum(tensor.nbytes for tensor in rt.trainer.state_dict(POLICY).values() if tensor.dim())
    seen["bytes per parameter"] = kept / parameters
    assert isinstance(rt.weight_sync, SharedWeights)
    ref = rt.weight_sync.push(POLICY)
    seen["trained"] = probabilities(rt, ref)
    seen["step without push"] = step_without_push(rt, ref)
    seen["old version"] = refused(lambda: probabilities(rt, ref))
    seen["resumed"] = resumed(rt, cfg)
    data = {"name_or_path": str(rows), "batch_size": 8, "heldout_rows": 4}
    other = full(model, run_dir / "sft", place, recipe="sft", num_steps=8, data=data)
    sft.run(other, open_training(other))
    return seen


def probabilities(rt: SamplingRuntime, ref: AdapterRef | None) -> dict[str, Any]:
    """Logprobs of fixed tokens by the engine and by the trainer."""
    scoring = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=True)
    requests = [
        SampleRequest(request_id=f"{ref}-{i}", prompt=Prompt(token_ids=p), sampling=scoring, adapter=ref)
        for i, p in enumerate(PROMPTS)
    ]
    engine = [x for c in generate(rt.engine, requests) for x in (c.prompt_logprobs or ())[1:]]
    datums = [Datum(token_ids=p, loss_mask=(False, *(True,) * (len(p) - 1))) for p in PROMPTS]
    batch = make_batch(datums, aggregation="sum", max_tokens=128)
    name = None if ref is None else POLICY
    return {
        "engine": np.array(engine, dtype=np.float32),
        "trainer": np.concatenate(rt.trainer.forward(name, batch).logprobs),
        "fingerprint": fingerprint(rt.trainer.base_weights()),
    }


def step_without_push(rt: SamplingRuntime, ref: AdapterRef) -> str | None:
    """What verify says when the optimizer has gone on."""
    from framework.algorithms.supervised import CrossEntropy
    from framework.types import AdamParams

    datums = [Datum(token_ids=p, loss_mask=(False, *(True,) * (len(p) - 1))) for p in PROMPTS]
    rt.weight_sync.verify(ref)
    rt.trainer.forward_backward(POLICY, make_batch(datums, aggregation="sum", max_tokens=128), CrossEntropy())
    rt.trainer.optim_step(POLICY, AdamParams(learning_rate=1e-3))
    message = refused(lambda: rt.weight_sync.verify(ref))
    rt.weight_sync.push(POLICY)
    return message


def resumed(rt: SamplingRuntime, cfg: RunConfig) -> dict[str, Any]:
    """The training is given up, taken up again from the checkpoint of step 2, and makes step 3 once more."""
    rt.trainer.remove_adapter(POLICY)
    again = replace(rt, **open_records(cfg, rt.base))
    assert again.resumed is not None
    grpo.run(cfg, again)
    return {**probabilities(again, again.weight_sync.push(POLICY)), "from step": again.resumed.step}


def refused(call: Any) -> str | None:
    try:
        call()
    except FrameworkError as error:
        return f"{type(error).__name__}: {error}"
    return None
