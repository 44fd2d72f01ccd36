"""The engine's Protocol. ``submit`` and ``step`` are the primitive; ``generate`` is ten lines on top.

Every method is collective over the tensor-parallel group and must be called with the same arguments on its ranks.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from framework.errors import ConfigError
from framework.lora.spec import LoraSpec
from framework.trainer.base import LoraShard
from framework.types import AdapterRef, Completion, Prompt, SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleRequest:
    """One prompt, one completion."""

    request_id: str
    """Unique among the requests in flight."""
    prompt: Prompt
    sampling: SamplingParams
    adapter: AdapterRef | None
    """The exact version to sample from; None is the base model."""
    stream: bool = False
    """Report tokens as they come in :attr:`StepOutput.new_tokens`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOutput:
    """What one engine step produced."""

    finished: Mapping[str, Completion]
    """Completions that ended in this step, by request id."""
    new_tokens: Mapping[str, tuple[int, ...]]
    """Tokens this step added, by request id, for requests with ``stream``; a finished one's last tokens included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineProfile:
    """What an engine on an accelerator knows of itself when all but its KV cache is there."""

    base_weights: Mapping[str, Tensor]
    """This rank's, by the layout's names."""
    activation_bytes: int
    """Peak of its largest step, over what stays between steps."""


class RolloutEngine(Protocol):
    """Samples from the base model and from a bounded number of adapter versions at once."""

    @property
    def max_adapters(self) -> int:
        """Slots; loading one more than this is an error, never a silent eviction."""

    @property
    def max_prompt_tokens(self) -> int:
        """The context length in tokens; prompt plus ``max_tokens`` may not exceed it."""

    def load_adapter(self, ref: AdapterRef, spec: LoraSpec, shards: Mapping[str, LoraShard]) -> None:
        """Binds a free slot to ``ref`` and copies this rank's shards into it, device to device.

        Raises:
            AdapterError: no slot is free, the rank is too large, or a module is unknown to the engine.
        """

    def read_adapter(self, ref: AdapterRef) -> Mapping[str, LoraShard]:
        """The slot's content by module path, cut to the adapter's rank: views of what the kernels will read.

        Raises:
            DeliveryError: the slot has been given to another version.
        """

    def unload_adapter(self, ref: AdapterRef) -> None:
        """Frees the slot. Requests in flight for it must have finished."""

    def submit(self, request: SampleRequest) -> None:
        """Queues a request.

        Raises:
            ConfigError: the prompt is empty, has an unknown token, or does not fit the context.
            AdapterError: the adapter version is not loaded.
        """

    def abort(self, request_ids: Sequence[str]) -> None: ...

    def step(self) -> StepOutput:
        """Runs the model once over what is scheduled. With nothing in flight it returns at once."""

    def has_unfinished(self) -> bool: ...

    def sleep(self) -> None:
        """Gives the KV cache's memory back. Nothing may be in flight."""

    def wake(self) -> None:
        """Takes it again, empty."""


class SharedWeightsEngine(RolloutEngine, Protocol):
    """An engine whose base weights somebody else may write into."""

    def base_weights(self) -> Mapping[str, Tensor]:
        """This rank's base parameters by the layout's names: the very tensors the engine samples with."""

    def adopt_weights(self, ref: AdapterRef) -> None:
        """The base weights have become ``ref``: it is served from now on, no earlier one is, cached prefixes are gone.

        Raises:
            AdapterError: requests are in flight, which would go on with other weights than they began with.
        """


def check_request(request: SampleRequest, *, vocab_size: int, context_tokens: int, known: Container[str]) -> None:
    """What every engine refuses.

    Args:
        request: to be submitted.
        vocab_size: of the model.
        context_tokens: prompt plus completion.
        known: ids of the requests in flight.

    Raises:
        ConfigError: the prompt is empty, has an unknown token or does not fit the context, or the id is in flight.
    """
    tokens, sampling = request.prompt.token_ids, request.sampling
    if not tokens:
        raise ConfigError(f"request {request.request_id}: the prompt has no tokens")
    if len(tokens) + sampling.max_tokens > context_tokens:
        raise ConfigError(
            f"request {request.request_id}: {len(tokens)} prompt tokens plus max_tokens={sampling.max_tokens} "
            f"exceed the context of {context_tokens} tokens; shorten the prompt, lower sampling.max_tokens "
            f"or raise engine.max_model_len"
        )
    odd = next((token for token in tokens if not 0 <= token < vocab_size), None)
    if odd is not None:
        raise ConfigError(f"request {request.request_id}: token {odd} is outside the vocabulary of {vocab_size}")
    if request.request_id in known:
        raise ConfigError(f"request id {request.request_id} is already in flight")


def generate(engine: RolloutEngine, requests: Sequence[SampleRequest]) -> tuple[Completion, ...]:
    """Submits all requests and steps the engine until each has its completion, in the order of ``requests``."""
    for request in requests:
        engine.submit(request)
    done: dict[str, Completion] = {}
    while len(done) < len(requests):
        done.update(engine.step().finished)
    return tuple(done[request.request_id] for request in requests)
