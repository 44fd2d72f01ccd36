"""Small parts with names and behaviour that stand in for heavy ones: an engine, ranks, a tokenizer."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from framework.engine.base import SampleRequest, StepOutput
from framework.errors import ConfigError
from framework.lora.spec import LoraSpec
from framework.trainer.base import LoraShard
from framework.types import AdapterRef, Completion

T = TypeVar("T")


class ScriptedEngine:
    """A RolloutEngine whose completions are a pure function of the request; one token per request and step.

    ``answer(request)`` gives all tokens of the completion; those beyond ``max_tokens`` are cut and the stop reason
    says so. The logprob of a token is ``-token_id / 1000``.
    """

    def __init__(self, answer: Callable[[SampleRequest], Sequence[int]], *, max_prompt_tokens: int = 512) -> None:
        self._answer = answer
        self._max_prompt_tokens = max_prompt_tokens
        self._flying: dict[str, tuple[SampleRequest, tuple[int, ...], int]] = {}
        self.submitted: list[SampleRequest] = []
        self.most_in_flight = 0
        self.num_steps = 0

    @property
    def max_adapters(self) -> int:
        return 1

    @property
    def max_prompt_tokens(self) -> int:
        return self._max_prompt_tokens

    def load_adapter(self, ref: AdapterRef, spec: LoraSpec, shards: Mapping[str, LoraShard]) -> None:
        raise NotImplementedError("this engine samples whatever adapter it is asked for")

    def read_adapter(self, ref: AdapterRef) -> Mapping[str, LoraShard]:
        raise NotImplementedError("this engine holds no weights")

    def unload_adapter(self, ref: AdapterRef) -> None:
        raise NotImplementedError("this engine holds no weights")

    def submit(self, request: SampleRequest) -> None:
        if len(request.prompt.token_ids) + request.sampling.max_tokens > self._max_prompt_tokens:
            raise ConfigError(f"request {request.request_id} does not fit {self._max_prompt_tokens} tokens")
        assert request.request_id not in self._flying
        tokens = tuple(self._answer(request))
        self._flying[request.request_id] = (request, tokens, 0)
        self.submitted.append(request)
        self.most_in_flight = max(self.most_in_flight, len(self._flying))

    def abort(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            del self._flying[request_id]

    def step(self) -> StepOutput:
        self.num_steps += 1
        finished: dict[str, Completion] = {}
        new_tokens: dict[str, tuple[int, ...]] = {}
        for request_id, (request, tokens, position) in list(self._flying.items()):
            new_tokens[request_id] = (tokens[position],)
            length = min(len(tokens), request.sampling.max_tokens)
            if position + 1 < length:
                self._flying[request_id] = (request, tokens, position + 1)
                continue
            del self._flying[request_id]
            finished[request_id] = Completion(
                token_ids=tokens[:length],
                sampling_logprobs=tuple(-token / 1000 for token in tokens[:length]),
                stop_reason="stop" if length == len(tokens) else "length",
                adapter=request.adapter,
            )
        return StepOutput(finished=finished, new_tokens=new_tokens)

    def has_unfinished(self) -> bool:
        return bool(self._flying)

    def sleep(self) -> None: ...

    def wake(self) -> None: ...


class OneRank:
    """A coordinator of a group of one."""

    is_leader = True

    def broadcast(self, value: T | None) -> T:
        return value  # type: ignore[return-value]


class ThreadRanks:
    """Coordinators of ``n`` ranks that are threads of this process; a broadcast meets at a barrier.

    A rank that broadcasts while another never does fails after ``timeout_s`` instead of hanging.
    """

    def __init__(self, n: int, *, timeout_s: float = 10.0) -> None:
        self._barrier = threading.Barrier(n, timeout=timeout_s)
        self._value: object = None
        self.ranks = [_ThreadRank(self, rank) for rank in range(n)]

    def exchange(self, value: object, *, is_leader: bool) -> object:
        if is_leader:
            self._value = value
        self._barrier.wait()
        value = self._value
        self._barrier.wait()
        return value


class _ThreadRank:
    def __init__(self, group: ThreadRanks, rank: int) -> None:
        self._group = group
        self.is_leader = rank == 0

    def broadcast(self, value: T | None) -> T:
        assert self.is_leader or value is None
        return self._group.exchange(value, is_leader=self.is_leader)  # type: ignore[return-value]
