"""What test_runtime_gpu.py runs on an accelerator: the pair as a recipe opens it, on a tiny model, cache computed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from framework.algorithms.supervised import CrossEntropy
from framework.batching import make_batch
from framework.config import RunConfig
from framework.device import Device
from framework.engine.base import SampleRequest, generate
from framework.errors import ConfigError
from framework.memory import full_microbatch
from framework.pair import open_base, open_pair
from framework.runtime import SamplingRuntime, open_sampling
from framework.types import AdamParams, AdapterRef, Datum, Prompt, SamplingParams
from recipes import grpo
from tests.recipes.scenario import config

CYCLES = 200


def small(model: Path, run_dir: Path, numerics: str = "fast", **overrides: Any) -> RunConfig:
    """The scenario's run on whatever device there is, its KV cache computed; eager, to start quickly."""
    engine = {"max_model_len": 256, "max_num_seqs": 32, "enforce_eager": True, **overrides}
    return config(
        model,
        run_dir,
        hardware={"device": "auto"},
        engine=engine,
        numerics=numerics,
        model__dtype="bfloat16",
        parity={"probe": False, "abort_abs_diff_mean": 1.0, "warn_abs_diff_mean": 1.0},
    )


def used(device: Device) -> int:
    """Bytes of the device that are not free, nothing cached by torch."""
    device.synchronize()
    device.release_cached()
    return device.memory_total() - device.memory_free()


def greedy(rt: SamplingRuntime, ref: AdapterRef) -> tuple[int, ...]:
    sampling = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True)
    request = SampleRequest(request_id="g", prompt=Prompt(token_ids=(3, 4, 5)), sampling=sampling, adapter=ref)
    return generate(rt.engine, [request])[0].token_ids


def on_rank(model: Path, run_dir: Path) -> dict[str, Any]:
    """Addresses, cycles of sleep with training between, and a run of the recipe that sleeps in every step."""
    cfg = small(model, run_dir, sleep=True)
    rt = open_sampling(cfg)
    engine, trainer, device = rt.engine, rt.trainer, rt.base.device
    theirs = {tensor.data_ptr() for tensor in engine.base_weights().values()}  # type: ignore[attr-defined]
    gpt = trainer._model  # type: ignore[attr-defined]
    ours = {name: tensor.data_ptr() for name, tensor in (*gpt.named_parameters(), *named_tensors(gpt))}
    trainer.add_adapter("cycled", cfg.lora, seed=0)
    ref = rt.weight_sync.push("cycled")
    batch = full_microbatch(rt.base.spec.vocab_size, 512, 128, multiple_of=1)
    before, seen = greedy(rt, ref), []
    for _ in range(CYCLES):
        awake = used(device)
        engine.sleep()
        asleep = used(device)
        trainer.forward_backward("cycled", batch, CrossEntropy())
        trainer.optim_step("cycled", AdamParams(learning_rate=0.0))
        engine.wake()
        after = greedy(rt, ref)
        seen.append((awake, asleep))
    rt.weight_sync.release("cycled")
    trainer.remove_adapter("cycled")
    grpo.run(cfg, rt)
    rows = [json.loads(line) for line in (rt.run_dir / "metrics.jsonl").read_text().splitlines()]
    return {
        "device": device.kind,
        "sleeps": rt.sleeps,
        "outside": sorted(name for name, place in ours.items() if place not in theirs),
        "shared": len(ours),
        "memory": seen,
        "same tokens": after == before,
        "steps": [row for row in rows if "time/step_s" in row],
    }


def agreement(
    model: Path, run_dir: Path, graphs: bool, numerics: str = "fast", temperature: float = 1.0
) -> dict[str, Any]:
    """Of an adapter that does something: the trainer's logprobs of sampled tokens, in one batch and each alone, the
    engine's as it sampled them, and the engine's reading of them (at temperature 1)."""
    cfg = small(model, run_dir, numerics, enforce_eager=not graphs)
    rt = open_sampling(cfg)
    rt.trainer.add_adapter("probe", cfg.lora, seed=0)
    batch = full_microbatch(rt.base.spec.vocab_size, 512, 128, multiple_of=1)
    for _ in range(3):
        rt.trainer.forward_backward("probe", batch, CrossEntropy())
        rt.trainer.optim_step("probe", AdamParams(learning_rate=1e-2))
    ref = rt.weight_sync.push("probe")
    prompts = [tuple(range(3 + i, 20 + 2 * i)) for i in range(8)]
    sampling = SamplingParams(max_tokens=150, ignore_eos=True, temperature=temperature)
    drawn = generate(rt.engine, _requests(prompts, ref, sampling))
    whole = [prompt + done.token_ids for prompt, done in zip(prompts, drawn, strict=True)]
    reading = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=True)
    read = generate(rt.engine, _requests(whole, ref, reading))
    datums = [
        Datum(
            token_ids=tokens,
            loss_mask=(False,) * len(prompt) + (True,) * (len(tokens) - len(prompt)),
            fields={"advantages": (0.0,) * len(tokens)},
        )
        for prompt, tokens in zip(prompts, whole, strict=True)
    ]
    packed = make_batch(datums, aggregation="token_mean", max_tokens=2048, temperature=temperature)
    alone = [make_batch([d], aggregation="token_mean", max_tokens=2048, temperature=temperature) for d in datums]
    return {
        "trainer": np.concatenate(rt.trainer.forward("probe", packed).logprobs),
        "alone": np.concatenate([x for one in alone for x in rt.trainer.forward("probe", one).logprobs]),
        "base": np.concatenate(rt.trainer.forward(None, packed).logprobs),
        "sampled": np.array([x for done in drawn for x in done.sampling_logprobs]),
        "read": np.array([x for p, c in zip(prompts, read, strict=True) for x in (c.prompt_logprobs or ())[len(p) :]]),
    }


def _requests(prompts: Sequence[tuple[int, ...]], ref: AdapterRef, sampling: SamplingParams) -> list[SampleRequest]:
    return [
        SampleRequest(request_id=str(i), prompt=Prompt(token_ids=prompt), sampling=sampling, adapter=ref)
        for i, prompt in enumerate(prompts)
    ]


def named_tensors(model: Any) -> list[tuple[str, Any]]:
    """The weights that modules hold as buffers."""
    return [
        (f"{path}.{name}", tensor)
        for path, module in model.named_modules()
        for name, tensor in module._buffers.items()
        if tensor is not None
    ]


def refusal(model: Path, run_dir: Path) -> dict[str, Any]:
    """A reserve that leaves nothing, and what the message advises."""
    base = open_base(small(model, run_dir))
    total_gib = base.device.memory_total() / 2**30
    try:
        open_pair(small(model, run_dir, memory_reserve_gib=total_gib - 0.5), base)
    except ConfigError as error:
        return {"message": str(error)}
    return {"message": None}
