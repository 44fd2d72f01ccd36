"""What the ranks do next, in words every rank can execute: the leader decides, all follow.

A plan is broadcast once per turn of the loop. Its actions run in order; then, if ``step`` is set, the engine runs once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from framework.lora.spec import LoraSpec
from framework.service.ops import AdapterOp
from framework.types import Prompt, SamplingParams

VersionKey = tuple[str, int]
"""(adapter id, how often its weights had changed)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Restore:
    """Brings an adapter into the trainer: from a snapshot folder, or fresh from its seed."""

    adapter_id: str
    spec: LoraSpec
    seed: int
    snapshot: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """Writes an adapter's exact state, gradients and optimizer included; with ``evict`` it leaves the trainer."""

    adapter_id: str
    folder: str | None
    """None when the newest snapshot has all of it."""
    evict: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """Brings the PEFT folder of an adapter of the simple client up to date; rank 0 writes it in the background."""

    adapter_id: str
    folder: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadVersion:
    """Puts a published version back into an engine slot."""

    key: VersionKey
    spec: LoraSpec
    folder: str


@dataclass(frozen=True, slots=True, kw_only=True)
class UnloadVersion:
    """Frees an engine slot; the version stays in its folder."""

    key: VersionKey


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """The next quantum of an adapter's op: all of it, or one microbatch of a TrainBatch."""

    request_id: str
    adapter_id: str
    op: AdapterOp | None
    """None after the first quantum: the ranks still have it."""
    folder: str | None = None
    """Where it writes a version or a checkpoint."""
    source: str | None = None
    """Where a LoadState or CreateAdapter reads."""
    publish_as: VersionKey | None = None
    """The version the weights become in the engine, when they are not a version yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Submit:
    """One completion for the engine."""

    engine_id: str
    prompt: Prompt
    sampling: SamplingParams
    key: VersionKey | None
    stream: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Abort:
    """Takes completions nobody waits for out of the engine."""

    engine_ids: tuple[str, ...]


Action = Restore | Snapshot | Export | LoadVersion | UnloadVersion | Run | Submit | Abort


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One turn of the loop."""

    actions: tuple[Action, ...] = ()
    step: bool = False
    stop: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """An action that failed alike on every rank."""

    message: str
    category: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedBatch:
    """The whole of a TrainBatch, in the order of its datums."""

    logprobs: tuple[npt.NDArray[np.float32], ...]
    """One float32 ``[scored]`` array per datum."""
    loss: float
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """A TrainBatch that has microbatches left."""

    done: int
    total: int
