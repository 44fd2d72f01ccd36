"""What test_grpo.py runs on real ranks: Megatron and vLLM on a tiny model, GRPO steps, and what each rank saw.

One launch serves many tests, because starting the engine costs more than everything it is asked.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from framework.batching import make_batch
from framework.config import RunConfig, to_typed
from framework.data.chat import Chat
from framework.engine.base import SampleRequest, generate
from framework.environments.base import StepResult
from framework.errors import FrameworkError
from framework.runtime import POLICY, SamplingRuntime, open_sampling
from framework.types import AdapterRef, Completion, Datum, Prompt, SamplingParams
from recipes import grpo
from tests.recipes.injections import injections

PROMPTS = tuple(tuple(range(7 + 3 * i, 20 + 4 * i)) for i in range(4))


class EvenTokens:
    """Rewards the fraction of even token ids: something every sampled token has a say in."""

    def __init__(self, prompt: tuple[int, ...]) -> None:
        self._prompt = prompt

    def observe(self) -> Prompt:
        return Prompt(token_ids=self._prompt)

    def step(self, completion: Completion) -> StepResult:
        even = sum(token % 2 == 0 for token in completion.token_ids)
        return StepResult(reward=even / len(completion.token_ids), done=True)


class EvenProblems:
    """Four prompts."""

    def __len__(self) -> int:
        return len(PROMPTS)

    def problem_id(self, index: int) -> str:
        return f"even/{index}"

    def make(self, index: int) -> EvenTokens:
        return EvenTokens(PROMPTS[index])


def config(model: Path, run_dir: Path, **overrides: Any) -> RunConfig:
    """A small run in fp32; ``overrides`` are dotted keys with ``__`` for the dots."""
    values: dict[str, Any] = {
        "num_steps": 5,
        "run_dir": str(run_dir),
        "model": {"name_or_path": str(model), "dtype": "float32"},
        "hardware": {"device": "cpu"},
        "lora": {"rank": 8, "alpha": 12.0},
        "engine": {"max_model_len": 256, "max_num_seqs": 32, "kv_cache_gib": 0.06},
        "environment": {"name": "tests.recipes.scenario.even_problems"},
        "sampling": {"max_tokens": 12, "temperature": 0.7},
        "rollout": {"prompts_per_step": 4, "group_size": 4},
        "optimizer": {"learning_rate": 2e-3},
        "evaluation": {"every": 0, "num_problems": 4},
        "tracking": {"wandb": "off", "tensorboard": False},
    }
    for key, value in overrides.items():
        section, _, leaf = key.partition("__")
        if leaf:
            values.setdefault(section, {})[leaf] = value
        else:
            values[section] = value
    return to_typed(values)


def even_problems(chat: Chat, *, split: str, seed: int) -> EvenProblems:
    """``environment.name=tests.recipes.scenario.even_problems``."""
    return EvenProblems()


def on_ranks(model: Path, run_dir: Path, **overrides: Any) -> dict[str, Any]:
    """Pushes, samples, compares, then runs the recipe."""
    cfg = config(model, run_dir, **overrides)
    rt = open_sampling(cfg)
    seen: dict[str, Any] = {"pushes": _pushes(rt, cfg), "refusals": _refusals(rt), "injections": _injections(rt, cfg)}
    rt.trainer.remove_adapter("probe")
    grpo.run(cfg, rt)
    state = rt.trainer.state_dict(POLICY)
    shards = rt.trainer.adapter_shards(POLICY)
    seen["replicated"] = {
        path: (shard.b if path.endswith(("o_proj", "down_proj")) else shard.a).clone() for path, shard in shards.items()
    }
    seen["master"] = state["master"]
    seen["step"] = int(state["step"])
    ref = rt.weight_sync.push(POLICY)
    completions = _sample(rt, ref, seed=5)
    seen["completions"] = [c.token_ids for c in completions]
    seen["export"] = dict(rt.trainer.export_adapter(POLICY))
    seen["logits"] = rt.trainer.logits(POLICY, torch.arange(3, 27))  # type: ignore[attr-defined]
    return seen


def _pushes(rt: SamplingRuntime, cfg: RunConfig) -> list[dict[str, Any]]:
    """Three versions of an adapter with random factors; what engine and trainer say of the engine's samples."""
    rt.trainer.add_adapter("probe", cfg.lora, seed=3)
    seen = []
    before: AdapterRef | None = None
    for version in range(3):
        _randomise(rt, seed=version)
        ref = rt.weight_sync.push("probe")
        completions = _sample(rt, ref, seed=11)
        trained = _trainer_logprobs(rt, "probe", completions, ref)
        base = _trainer_logprobs(rt, None, completions, ref)
        sampled = np.concatenate([c.sampling_logprobs for c in completions])
        seen.append(
            {
                "ref": (ref.name, ref.version),
                "previous_gone": before is None or _refused(lambda old=before: _sample(rt, old, seed=1)) is not None,
                "tokens": [c.token_ids for c in completions],
                "diff": float(np.abs(trained - sampled).mean()),
                "diff_to_base": float(np.abs(base - sampled).mean()),
                "hash": ref.content_hash,
            }
        )
        before = ref
    seen.append({"prefix_cache": _same_prompt_twice(rt)})
    return seen


def _randomise(rt: SamplingRuntime, seed: int) -> None:
    """Random B, so that the adapter does something."""
    rng = np.random.default_rng(seed)
    whole = dict(rt.trainer.export_adapter("probe"))
    rt.trainer.import_adapter(
        "probe",
        {k: rng.normal(size=v.shape, scale=0.1).astype(np.float32) if "lora_B" in k else v for k, v in whole.items()},
    )


def _sample(rt: SamplingRuntime, ref: AdapterRef | None, seed: int) -> tuple[Completion, ...]:
    sampling = SamplingParams(max_tokens=12, temperature=0.7, seed=seed, ignore_eos=True)
    return generate(
        rt.engine,
        [
            SampleRequest(
                request_id=f"{ref}-{seed}-{i}", prompt=Prompt(token_ids=prompt), sampling=sampling, adapter=ref
            )
            for i, prompt in enumerate(PROMPTS)
        ],
    )


def _trainer_logprobs(
    rt: SamplingRuntime, name: str | None, completions: tuple[Completion, ...], ref: AdapterRef
) -> np.ndarray[Any, np.dtype[np.float32]]:
    datums = [
        Datum(
            token_ids=prompt + c.token_ids,
            loss_mask=(False,) * len(prompt) + (True,) * len(c.token_ids),
            adapter=ref,
        )
        for prompt, c in zip(PROMPTS, completions, strict=True)
    ]
    batch = make_batch(
        datums, aggregation="sum", max_tokens=128, multiple_of=rt.trainer.token_multiple, temperature=0.7, version=ref
    )
    return np.concatenate(rt.trainer.forward(name, batch).logprobs)


def _same_prompt_twice(rt: SamplingRuntime) -> list[tuple[tuple[int, ...], ...]]:
    """With prefix caching: version A, version B, then A's weights again under a new version."""
    seen = []
    for seed in (100, 101, 100):
        _randomise(rt, seed=seed)
        ref = rt.weight_sync.push("probe")
        seen.append(tuple(c.token_ids for c in _sample(rt, ref, seed=7)))
    return seen


def _refusals(rt: SamplingRuntime) -> Mapping[str, str | None]:
    def ask(prompt: tuple[int, ...], ref: AdapterRef | None = None, max_tokens: int = 4) -> None:
        rt.engine.submit(
            SampleRequest(
                request_id="bad",
                prompt=Prompt(token_ids=prompt),
                sampling=SamplingParams(max_tokens=max_tokens),
                adapter=ref,
            )
        )

    unknown = AdapterRef(name="nobody", version=999, content_hash="")
    shards = rt.trainer.adapter_shards("probe")
    spec = rt.trainer.adapters()["probe"]
    extra = AdapterRef(name="extra", version=500, content_hash="")
    rt.engine.load_adapter(extra, spec, shards)
    refused = {
        "empty": _refused(lambda: ask(())),
        "long": _refused(lambda: ask(tuple(range(250)), max_tokens=50)),
        "vocabulary": _refused(lambda: ask((5, 10**6))),
        "unknown_version": _refused(lambda: ask((5, 6), unknown)),
        "full": _refused(
            lambda: rt.engine.load_adapter(AdapterRef(name="x", version=501, content_hash=""), spec, shards)
        ),
        "twice": _refused(lambda: rt.engine.load_adapter(extra, spec, shards)),
    }
    rt.engine.unload_adapter(extra)
    odd = {path.replace("q_proj", "z_proj"): shard for path, shard in shards.items()}
    refused["module"] = _refused(lambda: rt.engine.load_adapter(extra, spec, odd))
    return refused


def _refused(call: Any) -> str | None:
    try:
        call()
    except FrameworkError as error:
        return f"{type(error).__name__}: {error}"
    return None


def _injections(rt: SamplingRuntime, cfg: RunConfig) -> dict[str, str | None]:
    """What becomes of faults put between this trainer and this engine."""
    sampling = SamplingParams(max_tokens=12, temperature=0.7, seed=3, ignore_eos=True)
    requests = [
        SampleRequest(request_id=f"injected-{i}", prompt=Prompt(token_ids=prompt), sampling=sampling, adapter=None)
        for i, prompt in enumerate(PROMPTS)
    ]
    return injections(rt, cfg, requests, randomise=lambda seed: _randomise(rt, seed=seed))
