"""What test_grpo_full.py runs on an accelerator: GRPO and SFT of every weight, in the engine's own tensors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from framework.batching import make_batch
from framework.config import RunConfig
from framework.engine.base import SampleRequest, generate
from framework.errors import FrameworkError
from framework.pair import open_trainer
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


def full(model: Path, run_dir: Path, **overrides: Any) -> RunConfig:
    """Every weight, bf16, on the accelerator."""
    options: dict[str, Any] = {
        "lora": None,
        "model": {"name_or_path": str(model), "dtype": "bfloat16"},
        "hardware": {"device": "cuda"},
        "engine__enforce_eager": True,
        "num_steps": 3,
        "optimizer": {"learning_rate": 1e-3},
        "checkpoint": {"every": 2},
        "resume": "auto",
    }
    return config(model, run_dir, **{**options, **overrides})


def on_an_accelerator(model: Path, rows: Path, run_dir: Path) -> dict[str, Any]:
    """Everything in one process, because starting the engine costs more than all that it is asked."""
    cfg = full(model, run_dir / "grpo")
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
    seen["resumed"] = resumed(rt, cfg, run_dir)
    data = {"name_or_path": str(rows), "batch_size": 8, "heldout_rows": 4}
    other = full(model, run_dir / "sft", recipe="sft", num_steps=8, data=data)
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


def resumed(rt: SamplingRuntime, cfg: RunConfig, run_dir: Path) -> dict[str, Any]:
    """A new trainer over the same engine takes up the checkpoint of step 2 and makes step 3 again."""
    trainer = open_trainer(cfg, rt.base, dict(rt.engine.base_weights()))  # type: ignore[attr-defined]
    sync = SharedWeights(
        trainer,
        rt.engine,  # type: ignore[arg-type]
        rt.weight_sync.versions,
        synchronize=rt.base.device.synchronize,
        check_lockstep=rt.mesh.check_lockstep,
    )
    again = replace(rt, trainer=trainer, weight_sync=sync, **open_records(cfg, rt.base))
    assert again.resumed is not None
    grpo.run(cfg, again)
    return {**probabilities(again, sync.push(POLICY)), "from step": again.resumed.step}


def refused(call: Any) -> str | None:
    try:
        call()
    except FrameworkError as error:
        return f"{type(error).__name__}: {error}"
    return None
