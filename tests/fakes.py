"""Small parts with names and behaviour that stand in for heavy ones: an engine, ranks, a tokenizer."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from framework.engine.base import SampleRequest, StepOutput
from framework.errors import ConfigError, LockstepError
from framework.lora.spec import LoraSpec
from framework.models.tiny import make_tiny_model
from framework.trainer.base import LoraShard
from framework.types import AdapterRef, Completion

T = TypeVar("T")

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_checkpoint(folder: Path, **shape: Any) -> Path:
    """A model of random weights with the tiny tokenizer, in ``folder/model``; ``shape`` is make_tiny_model's."""
    tiny_tokenizer().save_pretrained(folder / "tokenizer")
    return make_tiny_model(folder / "model", tokenizer_path=folder / "tokenizer", **shape)


@cache
def tiny_tokenizer(chat_template: str = CHATML) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 320 tokens, made on the spot: ``<|im_start|>`` is 0, ``<|im_end|>`` (eos) is 1.

    Two line breaks in a row are one token, as in the tokenizers of real chat models.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        show_progress=False,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(["user", "assistant", "system", "tool", "\n\n", "the answer is"] * 9, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>", chat_template=chat_template
    )


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

    def run_on_leader(self, work: Callable[[], T]) -> T:
        return work()

    def check_lockstep(self, what: str, value: object) -> None:
        """One rank cannot disagree."""


class ThreadRanks:
    """Coordinators of ``n`` ranks that are threads of this process; they meet at a barrier.

    A rank that waits for another longer than ``timeout_s`` fails instead of hanging.
    """

    def __init__(self, n: int, *, timeout_s: float = 10.0) -> None:
        self.barrier = threading.Barrier(n, timeout=timeout_s)
        self.outcome: tuple[object, Exception | None] = (None, None)
        self.values: list[str] = []
        self.ranks = [ThreadRank(self, is_leader=rank == 0) for rank in range(n)]


class ThreadRank:
    """One rank of :class:`ThreadRanks`."""

    def __init__(self, group: ThreadRanks, *, is_leader: bool) -> None:
        self._group = group
        self.is_leader = is_leader

    def check_lockstep(self, what: str, value: object) -> None:
        """Each rank leaves its value; all compare."""
        self._group.barrier.wait()
        self._group.values.append(repr(value))
        self._group.barrier.wait()
        differ = len(set(self._group.values)) > 1
        self._group.barrier.wait()
        if self.is_leader:
            self._group.values.clear()
        self._group.barrier.wait()
        if differ:
            raise LockstepError(f"the ranks disagree before {what}")

    def run_on_leader(self, work: Callable[[], T]) -> T:
        if self.is_leader:
            try:
                self._group.outcome = (work(), None)
            except Exception as error:  # noqa: BLE001 - raised on every rank below
                self._group.outcome = (None, error)
        self._group.barrier.wait()
        value, failure = self._group.outcome
        self._group.barrier.wait()
        if failure is not None:
            raise failure
        return value  # type: ignore[return-value]
