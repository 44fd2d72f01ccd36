"""TrainerEngine: the RolloutEngine Protocol with the trainer's own model, for where vLLM is not wanted.

It is written to be obviously right, not fast. A version is an adapter of the trainer that is never trained: its
working copy is overwritten with the pushed factors, bit for bit, and its gradient and moments stay unused memory (16
bytes a parameter). Each request is a sequence of its own, so its tokens and logprobs do not depend on who else samples.

    step: for each request in flight, first come, first served, up to max_num_seqs:
          what it has not read yet -> trainer.extend -> logits -> draw -> one token more

How much of what was read is kept between steps is the trainer's matter: transformers keeps keys and values, the
Megatron trainer reads the whole sequence again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from framework.engine.base import SampleRequest, StepOutput, check_request
from framework.engine.trainer.draw import draw, likeliest, log_distribution
from framework.errors import AdapterError
from framework.lora.spec import LoraSpec
from framework.trainer.base import LoraShard, Trainer
from framework.types import AdapterRef, Completion, StopReason
from framework.watchdog import Watchdog


class SamplingTrainer(Trainer, Protocol):
    """A trainer whose model can also be asked for what comes next."""

    def extend(self, name: str | None, past: Any, token_ids: Tensor, *, keep: int) -> tuple[Tensor, Any]:
        """Reads further tokens of one sequence, without gradient.

        Args:
            name: adapter, or None for the base model.
            past: what an earlier call returned for the tokens before these; None at the start. It is used up.
            token_ids: ``[n]`` int64, n >= 1.
            keep: of how many of the last positions logits are wanted, 1 to n.

        Returns:
            Logits ``[keep, vocab]`` float32 on the host, the same on every rank, and the new ``past``.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerEngineOptions:
    """What the engine is started with."""

    max_model_len: int
    """Context length in tokens: prompt plus completion."""
    max_num_seqs: int
    """Requests that are worked on at once; more wait."""
    max_adapters: int
    """Adapter versions."""
    vocab_size: int
    end_tokens: frozenset[int]
    """Tokens that end a completion unless ``ignore_eos``."""


@dataclass(slots=True, kw_only=True)
class Slot:
    """A place for one version: an adapter of the trainer, under a name no tenant can have."""

    name: str
    spec: LoraSpec
    shards: Mapping[str, LoraShard]
    """Views of the working copy the model computes with."""


@dataclass(slots=True, kw_only=True)
class Flight:
    """A request on its way."""

    request: SampleRequest
    generator: torch.Generator
    unread: list[int]
    """Tokens the model has not read: at first the prompt, then the token drawn last."""
    past: Any = None
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top: list[tuple[tuple[int, float], ...]] = field(default_factory=list)
    prompt_logprobs: list[float | None] | None = None
    top_prompt: list[tuple[tuple[int, float], ...]] | None = None


class TrainerEngine:
    """Samples from the base model and from the adapter versions loaded into its slots."""

    def __init__(
        self, trainer: SamplingTrainer, tokenizer: Any, options: TrainerEngineOptions, *, watchdog: Watchdog
    ) -> None:
        """Nothing is computed yet.

        Args:
            trainer: the same one that trains.
            tokenizer: a transformers tokenizer, for stop strings.
            options: the engine's.
            watchdog: of this rank.
        """
        self._trainer = trainer
        self._tokenizer = tokenizer
        self._options = options
        self._watchdog = watchdog
        self._seeds = torch.Generator().manual_seed(0)  # of requests without a seed; the same on every rank
        self._slots: dict[int, Slot] = {}
        self._free: list[Slot] = []
        self._num_slots_made = 0
        self._flights: dict[str, Flight] = {}
        self._base_ref: AdapterRef | None = None

    def base_weights(self) -> Mapping[str, Tensor]:
        """See :meth:`SharedWeightsEngine.base_weights`."""
        return self._trainer.base_weights()

    def adopt_weights(self, ref: AdapterRef) -> None:
        """See :meth:`SharedWeightsEngine.adopt_weights`."""
        if self._flights:
            raise AdapterError(f"{ref} cannot be adopted: {len(self._flights)} requests still sample from the weights")
        self._base_ref = ref

    @property
    def max_adapters(self) -> int:
        """See the Protocol."""
        return self._options.max_adapters

    @property
    def max_prompt_tokens(self) -> int:
        """See the Protocol."""
        return self._options.max_model_len

    def load_adapter(self, ref: AdapterRef, spec: LoraSpec, shards: Mapping[str, LoraShard]) -> None:
        """See :meth:`RolloutEngine.load_adapter`."""
        if ref.version in self._slots:
            raise AdapterError(f"{ref} is already loaded; a version is never loaded twice")
        if len(self._slots) >= self.max_adapters:
            raise AdapterError(
                f"all {self.max_adapters} adapter slots are taken; unload one or raise engine.max_adapters"
            )
        slot = self._slot_for(spec)
        odd = sorted(set(shards) ^ set(slot.shards))
        if odd:
            self._free.append(slot)
            raise AdapterError(f"{ref}: these modules are missing or unknown: {odd[:4]} ({len(odd)} in all)")
        for path, shard in shards.items():
            slot.shards[path].a.copy_(shard.a)
            slot.shards[path].b.copy_(shard.b)
        self._slots[ref.version] = slot

    def _slot_for(self, spec: LoraSpec) -> Slot:
        """A free slot of this shape; one of another shape makes way for a new one."""
        slot = next((slot for slot in self._free if slot.spec == spec), None)
        if slot is not None:
            self._free.remove(slot)
            return slot
        if len(self._slots) + len(self._free) >= self.max_adapters:
            self._trainer.remove_adapter(self._free.pop(0).name)
        name = f"engine/{self._num_slots_made}"
        self._num_slots_made += 1
        self._trainer.add_adapter(name, spec, seed=0)
        return Slot(name=name, spec=spec, shards=self._trainer.adapter_shards(name))

    def read_adapter(self, ref: AdapterRef) -> Mapping[str, LoraShard]:
        """See :meth:`RolloutEngine.read_adapter`."""
        return self._slot(ref).shards

    def unload_adapter(self, ref: AdapterRef) -> None:
        """See :meth:`RolloutEngine.unload_adapter`."""
        users = [request_id for request_id, flight in self._flights.items() if flight.request.adapter == ref]
        if users:
            raise AdapterError(f"{ref} cannot be unloaded: requests {users[:4]} still sample from it")
        self._free.append(self._slot(ref))
        del self._slots[ref.version]

    def _slot(self, ref: AdapterRef) -> Slot:
        if ref.version not in self._slots:
            raise AdapterError(f"adapter version {ref} is not loaded; push it before sampling from it")
        return self._slots[ref.version]

    def _name_of(self, ref: AdapterRef | None) -> str | None:
        """What the trainer calls the version; the base model under training has a name of its own."""
        if ref is None:
            return None
        return ref.name if ref == self._base_ref else self._slot(ref).name

    def submit(self, request: SampleRequest) -> None:
        """See :meth:`RolloutEngine.submit`."""
        check_request(
            request, vocab_size=self._options.vocab_size, context_tokens=self.max_prompt_tokens, known=self._flights
        )
        self._name_of(request.adapter)  # refuses a version that is not loaded
        seed = request.sampling.seed
        if seed is None:
            seed = int(torch.randint(2**62, (1,), generator=self._seeds))
        self._flights[request.request_id] = Flight(
            request=request,
            generator=torch.Generator().manual_seed(seed),
            unread=list(request.prompt.token_ids),
        )

    def abort(self, request_ids: Sequence[str]) -> None:
        """Drops requests; those that are not in flight are ignored."""
        for request_id in request_ids:
            self._flights.pop(request_id, None)

    def step(self) -> StepOutput:
        """See :meth:`RolloutEngine.step`."""
        finished: dict[str, Completion] = {}
        new_tokens: dict[str, tuple[int, ...]] = {}
        for request_id, flight in list(self._flights.items())[: self._options.max_num_seqs]:
            with self._watchdog.watch("an engine step"):
                token = self._advance(flight)
            if flight.request.stream:
                new_tokens[request_id] = (token,)
            stop_reason = self._stop_reason(flight)
            if stop_reason is not None:
                finished[request_id] = _completion(flight, stop_reason)
                del self._flights[request_id]
        return StepOutput(finished=finished, new_tokens=new_tokens)

    def _advance(self, flight: Flight) -> int:
        """Reads what is unread and draws one token."""
        request, sampling = flight.request, flight.request.sampling
        wants_prompt = not flight.tokens and (sampling.prompt_logprobs or sampling.top_prompt_logprobs > 0)
        name = self._name_of(request.adapter)
        logits, flight.past = self._trainer.extend(
            name, flight.past, torch.tensor(flight.unread), keep=len(flight.unread) if wants_prompt else 1
        )
        if wants_prompt:
            _score_prompt(flight, logits)
        logprobs = log_distribution(logits[-1], sampling)
        token = draw(logprobs, sampling, flight.generator)
        flight.unread = [token]
        flight.tokens.append(token)
        flight.logprobs.append(float(logprobs[token]))
        flight.top.append(likeliest(logprobs, sampling.top_logprobs))
        return token

    def _stop_reason(self, flight: Flight) -> StopReason | None:
        """Why the completion ends with its newest token, if it does."""
        sampling, token = flight.request.sampling, flight.tokens[-1]
        if token in self._options.end_tokens and not sampling.ignore_eos:
            return "stop"
        if token in sampling.stop_token_ids:
            return "stop"
        if sampling.stop:
            text = self._tokenizer.decode(flight.tokens, skip_special_tokens=True)
            if any(stop in text for stop in sampling.stop):
                return "stop"
        return "length" if len(flight.tokens) >= sampling.max_tokens else None

    def has_unfinished(self) -> bool:
        """Whether requests are in flight."""
        return bool(self._flights)

    def sleep(self) -> None:
        """There is no cache besides that of requests in flight."""
        assert not self._flights, "the engine was put to sleep with requests in flight"

    def wake(self) -> None:
        """Nothing was given back."""


def _score_prompt(flight: Flight, logits: Tensor) -> None:
    """Logprobs of the prompt's tokens, each given those before it, at temperature 1; ``logits`` of every position."""
    logprobs = torch.log_softmax(logits[:-1], dim=1)
    tokens = torch.tensor(flight.request.prompt.token_ids[1:])
    flight.prompt_logprobs = [None, *logprobs.gather(1, tokens[:, None])[:, 0].tolist()]
    k = flight.request.sampling.top_prompt_logprobs
    if k:
        flight.top_prompt = [(), *(likeliest(row, k) for row in logprobs)]


def _completion(flight: Flight, stop_reason: StopReason) -> Completion:
    return Completion(
        token_ids=tuple(flight.tokens),
        sampling_logprobs=tuple(flight.logprobs),
        stop_reason=stop_reason,
        adapter=flight.request.adapter,
        prompt_logprobs=None if flight.prompt_logprobs is None else tuple(flight.prompt_logprobs),
        top_logprobs=tuple(flight.top) if flight.request.sampling.top_logprobs else None,
        top_prompt_logprobs=None if flight.top_prompt is None else tuple(flight.top_prompt),
    )
