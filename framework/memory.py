"""How an accelerator's memory is divided between trainer and KV cache: measured and computed, before anything runs.

At the start, with the engine's weights in place and its cache not yet, the trainer makes one step with full
microbatches and an adapter that is thrown away. What it takes at its peak is what the device has less at the end of it,
fragments included, because nothing is given back meanwhile. The rest is arithmetic:

    free  = reserve + [ adapter + the larger of (engine's step, trainer's step) ] + KV cache          side by side
    free  = reserve +   adapter + engine's step + KV cache,  and  free >= reserve + adapter + trainer's step    asleep
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from framework.algorithms.supervised import CrossEntropy
from framework.batching import Batch, make_batch
from framework.device import Device
from framework.errors import ConfigError
from framework.lora.spec import LoraSpec
from framework.models.spec import ModelSpec
from framework.trainer.base import Trainer
from framework.types import AdamParams, Datum

MEASURED = "memory-measurement"
"""Name of the adapter; it exists only while the trainer is measured."""
FIRST_TOKENS = 64
"""Of the step before the measured ones."""
SHORT_PIECES = 8
"""The second microbatch is of sequences shorter by this factor: attention over many sequences is another kernel."""
TOKEN_GRAIN, CONTEXT_GRAIN, RANK_GRAIN = 128, 16, 8
"""What proposed values are multiples of."""
GIB = 2.0**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """What training one adapter takes of the device's memory, in bytes."""

    adapter_bytes: int
    """Its state, which stays between steps."""
    step_bytes: int
    """At the peak of a step with microbatches of :attr:`num_tokens`, over the state."""
    num_tokens: int
    """The largest microbatch that was measured; smaller than what was asked for if that did not fit."""

    def step_of(self, num_tokens: int) -> int:
        """A step's peak for another size of microbatch, taken to grow with it."""
        return -(-self.step_bytes * num_tokens // self.num_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What the two sides want, in the configuration's terms."""

    microbatch_tokens: int
    recompute: str
    num_adapters: int
    """Whose state the trainer holds at once."""
    lora_rank: int
    """0 where every weight is trained."""
    context_tokens: int
    """Of one sequence; a cache that cannot hold one is of no use."""
    num_sequences: int
    """That run at once; a cache that holds so many whole ones has nothing to gain."""
    bytes_per_token: int
    """Of the KV cache, on this rank."""
    reserve_bytes: int
    sleep: bool | None
    """Whether the cache may be given up while training; None where that makes it larger."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CachePlan:
    """The decision, with what it was made of, in bytes."""

    cache_bytes: int
    sleeps: bool
    """The engine must sleep while the trainer works."""
    free_bytes: int
    """Of the device, before cache and adapters."""
    activation_bytes: int
    step_bytes: int
    adapter_bytes: int
    reserve_bytes: int

    def __str__(self) -> str:
        parts = {
            "KV cache": self.cache_bytes,
            "adapters": self.adapter_bytes,
            "a training step": self.step_bytes,
            "a sampling step": self.activation_bytes,
            "reserve": self.reserve_bytes,
        }
        text = ", ".join(f"{what} {size / GIB:.2f}" for what, size in parts.items())
        return f"GiB of {self.free_bytes / GIB:.2f} free: {text}; the engine {'sleeps' if self.sleeps else 'stays'}"


def kv_bytes_per_token(spec: ModelSpec, *, tp_size: int, dtype: torch.dtype) -> int:
    """Keys and values of one token in all layers, on one rank."""
    return 2 * spec.num_layers * spec.kv_size // tp_size * dtype.itemsize


def measure_trainer(
    trainer: Trainer, device: Device, lora: LoraSpec | None, *, vocab_size: int, num_tokens: int, max_length: int
) -> Footprint:
    """Makes real steps on random tokens with a state of its own. All ranks must call it.

    Where a full microbatch does not fit, it is halved until it does.

    Args:
        trainer: with its base weights in place.
        device: of this rank; an accelerator.
        lora: of the run; None trains every weight, and each must come out as it went in: the learning rate is 0.
        vocab_size: tokens are drawn below it.
        num_tokens: the configured budget of a microbatch.
        max_length: of one sequence.
    """
    device.synchronize()
    device.release_cached()
    before = device.memory_free()
    if lora is None:
        trainer.train_base(MEASURED)
    else:
        trainer.add_adapter(MEASURED, lora, seed=0)
    device.synchronize()
    adapter_bytes = before - device.memory_free()
    try:
        # Libraries take their workspaces at their first product, for good: not out of a large step's activations.
        first = min(FIRST_TOKENS, num_tokens)
        _train(trainer, device, vocab_size=vocab_size, num_tokens=first, max_length=first)
        device.release_cached()
        while True:
            left = _train(trainer, device, vocab_size=vocab_size, num_tokens=num_tokens, max_length=max_length)
            device.release_cached()
            if left is not None:
                break
            trainer.zero_grad(MEASURED)
            num_tokens //= 2
        device.synchronize()
        # Compared with what is free now: libraries keep workspaces and kernels for good.
        step_bytes = max(0, device.memory_free() - left)
    finally:
        trainer.remove_adapter(MEASURED)
        device.release_cached()
    return Footprint(adapter_bytes=max(0, adapter_bytes), step_bytes=step_bytes, num_tokens=num_tokens)


def _train(trainer: Trainer, device: Device, *, vocab_size: int, num_tokens: int, max_length: int) -> int | None:
    """Free bytes at the end of one step, before anything is given back; None if it did not fit."""
    batches = [
        full_microbatch(vocab_size, num_tokens, length, multiple_of=trainer.token_multiple)
        for length in (max_length, max(2, max_length // SHORT_PIECES))
    ]
    try:
        for batch in batches:
            trainer.forward_backward(MEASURED, batch, CrossEntropy())
        trainer.optim_step(MEASURED, AdamParams(learning_rate=0.0))
        device.synchronize()
        return device.memory_free()
    except torch.OutOfMemoryError:
        if num_tokens < 4:
            raise
        return None


def full_microbatch(vocab_size: int, num_tokens: int, max_length: int, *, multiple_of: int) -> Batch:
    """``num_tokens`` tokens in sequences of ``max_length``, the last one shorter, every token scored."""
    num_tokens -= num_tokens % multiple_of
    generator = torch.Generator().manual_seed(0)
    lengths = [max_length] * (num_tokens // max_length)
    if rest := num_tokens % max_length:
        lengths.append(rest)
    datums = [_random_datum(vocab_size, length, generator) for length in lengths]
    return make_batch(datums, aggregation="sum", max_tokens=num_tokens, multiple_of=multiple_of)


def _random_datum(vocab_size: int, length: int, generator: torch.Generator) -> Datum:
    tokens = torch.randint(0, vocab_size, (length + 1,), generator=generator).tolist()  # one is lost in the shift
    return Datum(token_ids=tuple(tokens), loss_mask=(False, *(True,) * length))


def plan_cache(demand: Demand, footprint: Footprint, *, free_bytes: int, activation_bytes: int) -> CachePlan:
    """How large the KV cache is, and whether the engine sleeps while training.

    Args:
        demand: of the configuration.
        footprint: of the trainer, measured.
        free_bytes: of the device, with everything in place but cache and adapters; the same on every rank.
        activation_bytes: peak of the engine's largest step.

    Raises:
        ConfigError: the two do not fit, asleep or not; settings that would make them are named with their values.
    """
    step = footprint.step_of(demand.microbatch_tokens)
    adapters = footprint.adapter_bytes * demand.num_adapters
    room = free_bytes - demand.reserve_bytes - adapters
    asleep, beside = room - activation_bytes, room - max(step, activation_bytes)
    wanted = (demand.num_sequences + 1) * demand.context_tokens * demand.bytes_per_token
    least = demand.context_tokens * demand.bytes_per_token
    sleeps = demand.sleep if demand.sleep is not None else beside < min(wanted, asleep)
    limit = asleep if sleeps else beside
    if room < step or limit < least:
        advice = _advice(demand, footprint, room=room, limit=limit, least=least, sleeps=sleeps)
        if not sleeps and min(asleep - least, room - step) >= 0:
            advice = ["engine.sleep=true", *advice]
        raise ConfigError(
            f"the device has {free_bytes / GIB:.2f} GiB beside the model, and that is not enough: an adapter's state "
            f"takes {adapters / GIB:.2f}, a training step {step / GIB:.2f} "
            f"({demand.microbatch_tokens} tokens at trainer.recompute={demand.recompute}), a sampling step "
            f"{activation_bytes / GIB:.2f}, the KV cache of one sequence of {demand.context_tokens} tokens "
            f"{least / GIB:.2f}, the reserve {demand.reserve_bytes / GIB:.2f}. It would fit with "
            f"{' or '.join(advice[:3]) or 'a smaller model, or more GPUs'}"
        )
    return CachePlan(
        cache_bytes=min(wanted, limit),
        sleeps=sleeps,
        free_bytes=free_bytes,
        activation_bytes=activation_bytes,
        step_bytes=step,
        adapter_bytes=adapters,
        reserve_bytes=demand.reserve_bytes,
    )


def _advice(demand: Demand, footprint: Footprint, *, room: int, limit: int, least: int, sleeps: bool) -> list[str]:
    """Settings of which each would do, by the measured figures; what only helps says so."""
    advice: list[str] = []
    step = footprint.step_of(demand.microbatch_tokens)
    for_step = room if sleeps else room - least
    if step > for_step and for_step > 0:
        tokens = demand.microbatch_tokens * for_step // step // TOKEN_GRAIN * TOKEN_GRAIN
        if tokens:
            advice.append(f"trainer.max_tokens_per_microbatch={tokens}")
        if demand.recompute != "full":
            advice.append("trainer.recompute=full (to be measured again)")
    if limit < least and room >= step:
        tokens = max(0, limit) // demand.bytes_per_token // CONTEXT_GRAIN * CONTEXT_GRAIN
        if tokens:
            advice.append(f"engine.max_model_len={tokens}")
    missing = max(step - room, least - limit)
    per_rank = footprint.adapter_bytes * demand.num_adapters / demand.lora_rank if demand.lora_rank else 0.0
    rank = int(demand.lora_rank - missing / per_rank) // RANK_GRAIN * RANK_GRAIN if per_rank else 0
    if rank > 0:
        advice.append(f"lora.rank={rank}")
    if demand.reserve_bytes - missing >= GIB:
        advice.append(f"engine.memory_reserve_gib={(demand.reserve_bytes - missing) / GIB:.1f}")
    return advice


def check_start(plan: CachePlan, *, free_bytes: int) -> None:
    """Checks, with the engine running and awake, that what it took beyond its cache left room for both sides' steps.

    Args:
        plan: what it was started with.
        free_bytes: of the device now, nothing cached by torch; the same on every rank.

    Raises:
        ConfigError: its graphs and buffers took more than the reserve.
    """
    for_training = free_bytes + (plan.cache_bytes if plan.sleeps else 0) - plan.adapter_bytes - plan.step_bytes
    for_sampling = free_bytes - plan.adapter_bytes - plan.activation_bytes
    missing = -min(for_training, for_sampling)
    if missing > 0:
        needed = (plan.reserve_bytes + missing) / GIB + 0.1
        raise ConfigError(
            f"engine.memory_reserve_gib={plan.reserve_bytes / GIB:.2f} is too small: with its graphs the engine took "
            f"{missing / GIB:.2f} GiB more; set engine.memory_reserve_gib={needed:.1f}, a smaller engine.max_num_seqs "
            f"(fewer graphs) or engine.enforce_eager=true (none)"
        )
