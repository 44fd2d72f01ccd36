"""Ops: what the service can be asked to do, as typed values that every rank understands.

A request is checked on rank 0 and becomes one op; the op travels to all ranks by broadcast. An op that could not be
made from its request is a :class:`Refuse`, because a numbered request must still take its turn.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from framework.batching import Example
from framework.errors import FrameworkError
from framework.lora.spec import LoraSpec
from framework.types import AdamParams, Prompt, SamplingParams

Category = Literal["user", "server"]
CheckpointKind = Literal["weights", "sampler_weights", "external_weights"]


class RequestError(FrameworkError, ValueError):
    """The client asked for something that cannot be done; the text is meant for the client.

    Args:
        message: what was given, what is allowed.
        status: the HTTP status when the error can still be told at once.
    """

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True, kw_only=True)
class LossSpec:
    """A loss by name, as :func:`framework.algorithms.tinker.tinker_loss` takes it."""

    name: str
    fields: tuple[str, ...] = ()
    """What the examples carry besides targets and weights."""
    config: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class CreateAdapter:
    """A new adapter, fresh or from a checkpoint."""

    spec: LoraSpec
    seed: int
    source: str | None = None
    """``tinker://`` path of a checkpoint whose weights it starts from, or a PEFT folder the service has checked."""
    optimizer: bool = False
    """Also take the checkpoint's Adam moments and step count."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainBatch:
    """One forward_backward, or with ``backward`` False one forward."""

    examples: tuple[Example, ...]
    shapes: tuple[tuple[int, ...], ...]
    """Of each datum's logprobs in the answer: ``(N,)``, or ``(N, K)`` for soft targets."""
    loss: LossSpec
    backward: bool = True

    @property
    def num_tokens(self) -> int:
        return sum(len(example.input_ids) for example in self.examples)


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimStep:
    """One AdamW step from the accumulated gradient."""

    params: AdamParams


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveCheckpoint:
    """Writes ``tinker://<adapter>/<kind>/<name>``."""

    kind: CheckpointKind
    name: str
    overwrite: bool = False
    ttl_seconds: int | None = None
    user_metadata: Mapping[str, str] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Publish:
    """Makes the adapter's current weights a version that can be sampled, and pins a sampling session to it."""

    sampling_session_id: str | None = None
    """None: nobody repeats it after a restart, so its file is written at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadState:
    """Overwrites an existing adapter from a checkpoint."""

    source: str
    """``tinker://`` path."""
    optimizer: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoveAdapter:
    """Forgets the adapter; its checkpoints stay."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refuse:
    """A request that takes its turn and then fails."""

    message: str
    category: Category = "user"


AdapterOp = CreateAdapter | TrainBatch | OptimStep | SaveCheckpoint | Publish | LoadState | RemoveAdapter | Refuse


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """``num_samples`` completions of one prompt from one pinned version."""

    prompt: Prompt
    sampling: SamplingParams
    num_samples: int
    version: tuple[str, int] | None
    """(adapter id, version); None is the base model."""
    prompt_logprobs_last_n: int | None = None
    stream: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a request ended, in the bytes the client gets."""

    body: bytes
    content_type: str
    failed: bool = False
    value: Any = None
    """For routes that answer at once: the result itself. Such outcomes are not kept in the registry."""
