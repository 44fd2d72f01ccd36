"""How memory is divided: the arithmetic, what is refused with which values, and the measurement on a fake device."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from framework.algorithms.base import LossFn
from framework.batching import Batch
from framework.device import Device, open_device
from framework.errors import ConfigError
from framework.lora.spec import LoraSpec
from framework.memory import (
    MEASURED,
    CachePlan,
    Demand,
    Footprint,
    check_start,
    full_microbatch,
    kv_bytes_per_token,
    measure_trainer,
    plan_cache,
)
from framework.models.spec import ModelSpec
from framework.types import AdamParams

GIB = 2**30
DEMAND = Demand(
    microbatch_tokens=16384,
    recompute="none",
    num_adapters=1,
    lora_rank=32,
    context_tokens=1024,
    num_sequences=31,
    bytes_per_token=2**20,  # one sequence is 1 GiB; with one to spare, 31 are 32 GiB
    reserve_bytes=2 * GIB,
    sleep=None,
)
FOOTPRINT = Footprint(adapter_bytes=GIB, step_bytes=20 * GIB, num_tokens=16384)


def plan(free_gib: float, *, activation_gib: float = 3.0, **changes: Any) -> CachePlan:
    return plan_cache(
        replace(DEMAND, **changes),
        FOOTPRINT,
        free_bytes=int(free_gib * GIB),
        activation_bytes=int(activation_gib * GIB),
    )


def test_with_room_for_both_nothing_sleeps_and_the_cache_is_no_larger_than_needed() -> None:
    roomy = plan(70)
    assert (roomy.cache_bytes, roomy.sleeps) == (32 * GIB, False)
    assert not plan(55).sleeps, "2 + 1 + 20 + 32 fit exactly"


def test_the_engine_sleeps_where_its_cache_would_else_be_smaller() -> None:
    tight = plan(54)
    assert (tight.cache_bytes, tight.sleeps) == (32 * GIB, True)
    tighter = plan(30)
    assert (tighter.cache_bytes, tighter.sleeps) == (24 * GIB, True), "30 - 2 - 1 - 3"
    awake = plan(30, sleep=False)
    assert (awake.cache_bytes, awake.sleeps) == (7 * GIB, False), "30 - 2 - 1 - 20"
    assert plan(70, sleep=True).sleeps


def test_sleep_gains_nothing_where_the_engines_own_step_is_the_larger() -> None:
    assert not plan(40, activation_gib=25.0).sleeps


def test_the_state_of_every_adapter_counts() -> None:
    assert plan(30, num_adapters=4, sleep=False).cache_bytes == 4 * GIB


@pytest.mark.parametrize("free_gib", [22.5, 20.0, 9.0])
def test_a_step_too_large_is_refused_with_a_budget_that_fits(free_gib: float) -> None:
    with pytest.raises(ConfigError, match=r"a training step 20.00 \(16384 tokens at trainer.recompute=none") as refused:
        plan(free_gib)
    text = str(refused.value)
    tokens = int(text.partition("trainer.max_tokens_per_microbatch=")[2].split()[0])
    assert plan(free_gib, microbatch_tokens=tokens).cache_bytes >= GIB
    assert tokens >= 0.9 * 16384 * (free_gib - 3) / 20, "no smaller than it has to be"
    assert "trainer.recompute=full" in text
    with pytest.raises(ConfigError) as least:
        plan(free_gib, recompute="full")
    assert "trainer.recompute=full (" not in str(least.value)


def test_a_cache_that_holds_no_sequence_is_refused_with_a_context_that_fits() -> None:
    with pytest.raises(ConfigError, match=r"engine\.max_model_len=2048") as refused:
        plan(25, context_tokens=65536, activation_gib=20.0, bytes_per_token=2**20)
    assert "engine.memory_reserve_gib" not in str(refused.value)
    assert plan(25, context_tokens=2048, activation_gib=20.0).cache_bytes >= 2048 * 2**20


def test_awake_by_configuration_the_advice_is_to_sleep() -> None:
    with pytest.raises(ConfigError, match=r"engine\.sleep=true"):
        plan(23.5, sleep=False)
    assert plan(23.5, sleep=True).cache_bytes >= GIB


def test_an_adapter_too_large_is_refused_with_a_rank_that_fits() -> None:
    large = Footprint(adapter_bytes=16 * GIB, step_bytes=4 * GIB, num_tokens=16384)
    with pytest.raises(ConfigError, match=r"lora\.rank=24"):
        plan_cache(DEMAND, large, free_bytes=20 * GIB, activation_bytes=GIB)
    smaller = replace(large, adapter_bytes=12 * GIB)
    assert plan_cache(DEMAND, smaller, free_bytes=20 * GIB, activation_bytes=GIB).cache_bytes >= GIB


def test_what_the_engine_took_beyond_its_cache_must_fit_the_reserve() -> None:
    tight = plan(30)
    check_start(tight, free_bytes=30 * GIB - tight.cache_bytes - 2 * GIB)  # graphs of 2 GiB: the whole reserve
    with pytest.raises(ConfigError, match=r"took 1\.00 GiB more; set engine\.memory_reserve_gib=3\.1"):
        check_start(tight, free_bytes=30 * GIB - tight.cache_bytes - 3 * GIB)


def test_a_microbatch_is_full_and_all_scored() -> None:
    batch = full_microbatch(100, 1000, 384, multiple_of=8)
    (microbatch,) = batch.microbatches
    assert microbatch.input_ids.shape == microbatch.scored.shape == (1000,)
    assert microbatch.cu_seqlens.tolist() == [0, 384, 768, 1000]


def test_bytes_of_a_token_in_the_cache() -> None:
    spec = ModelSpec(
        family="qwen3", hidden_size=2560, num_layers=36, num_heads=32, num_kv_heads=8, head_dim=128, ffn_size=9728,
        vocab_size=151936, norm_eps=1e-6, rope_theta=1e6, rope_scaling=None, tied_embeddings=True, qkv_bias=False,
        qk_norm=True, max_position_embeddings=40960,
    )  # fmt: skip
    assert kv_bytes_per_token(spec, tp_size=1, dtype=torch.bfloat16) == 147_456
    assert kv_bytes_per_token(spec, tp_size=2, dtype=torch.bfloat16) == 73_728


class FakeMemory:
    """A device of ``total`` bytes: what was freed stays cached until it is given back."""

    def __init__(self, total: int) -> None:
        self.total, self.used, self.cached = total, 0, 0

    def take(self, size: int) -> None:
        if self.used + size > self.total:
            raise torch.OutOfMemoryError(f"{size} bytes")
        self.used += size
        self.cached = max(0, self.cached - size)

    def free(self, size: int) -> None:
        self.used -= size
        self.cached += size

    def release(self) -> None:
        self.cached = 0

    def device(self) -> Device:
        return replace(
            open_device("cpu", local_rank=0),
            memory_free=lambda: self.total - self.used - self.cached,
            memory_total=lambda: self.total,
            release_cached=self.release,
        )


class FakeTrainer:
    """Takes ``per_token`` bytes while it works, ``state`` for an adapter, and ``kept`` for good with its first step."""

    token_multiple = 1

    def __init__(self, memory: FakeMemory, *, state: int, per_token: int, kept: int) -> None:
        self.memory, self.state, self.per_token, self.kept = memory, state, per_token, kept
        self.tokens: list[int] = []

    def add_adapter(self, name: str, spec: LoraSpec, *, seed: int) -> None:
        assert name == MEASURED
        self.memory.take(self.state)

    def remove_adapter(self, name: str) -> None:
        self.memory.free(self.state)

    def zero_grad(self, name: str) -> None: ...

    def forward_backward(self, name: str, batch: Batch, loss_fn: LossFn) -> None:
        if self.kept:
            self.memory.take(self.kept)
            self.kept = 0
        (microbatch,) = batch.microbatches
        size = self.per_token * len(microbatch.input_ids)
        self.memory.take(size)
        self.memory.free(size)
        self.tokens.append(len(microbatch.input_ids))

    def optim_step(self, name: str, params: AdamParams) -> None:
        assert params.learning_rate == 0.0


def measured(total: int) -> tuple[Footprint, FakeTrainer]:
    memory = FakeMemory(total)
    trainer: Any = FakeTrainer(memory, state=1000, per_token=10, kept=500)
    footprint = measure_trainer(trainer, memory.device(), LoraSpec(), vocab_size=50, num_tokens=256, max_length=64)
    assert (memory.used, memory.cached) == (500, 0), "the adapter is gone and nothing is kept but the workspace"
    return footprint, trainer


def test_a_step_is_measured_without_what_stays_for_good() -> None:
    footprint, trainer = measured(10_000)
    assert footprint == Footprint(adapter_bytes=1000, step_bytes=2560, num_tokens=256)
    assert trainer.tokens == [64, 64, 256, 256], "the workspace is taken by a small step"
    assert footprint.step_of(512) == 5120


def test_what_does_not_fit_is_halved_and_the_whole_reckoned_from_it() -> None:
    footprint, trainer = measured(3_000)
    assert footprint == Footprint(adapter_bytes=1000, step_bytes=1280, num_tokens=128)
    assert trainer.tokens == [64, 64, 128, 128]
    assert footprint.step_of(256) == 2560
