"""Rows of a data set to datums: demonstrations for supervised fine-tuning, pairs for preference optimisation.

A demonstration has ``messages``, or ``prompt`` and ``completion``. A preference has ``prompt``, ``chosen`` and
``rejected``, or only the latter two as whole conversations that begin alike. Prompts and answers are strings or lists
of messages; ``tools`` beside them goes to the chat template. Reading is in datasets.py, order and resuming in order.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np

from framework.batching import pack, shift
from framework.data.chat import Chat, Message, Tools, check_messages
from framework.data.datasets import Row, Rows
from framework.errors import DataError
from framework.types import Datum

TooLong = Literal["error", "truncate"]
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferencePair:
    """Two answers to one prompt. The loss masks are True on the answers only."""

    chosen: Datum
    rejected: Datum


class Demonstrations:
    """A data set of conversations as datums.

    Example:
        data = Demonstrations(open_rows("chats.jsonl"), chat, max_tokens=2048)
        order = ShuffledOrder(len(data), seed=0, blocks=data.blocks)
        datums = [data.datum(index) for index in order.next(32)]

    Args:
        rows: see the module.
        chat: the model's template, which is checked here.
        max_tokens: of one datum.
        too_long: what becomes of a longer one; ``truncate`` cuts its end off.

    Raises:
        DataError: the chat template cannot tell the assistant's tokens apart.
    """

    def __init__(self, rows: Rows, chat: Chat, *, max_tokens: int, too_long: TooLong = "error") -> None:
        chat.check_training()
        self._rows = rows
        self._chat = chat
        self._max_tokens = max_tokens
        self._too_long = too_long

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def blocks(self) -> Sequence[int] | None:
        """See :class:`framework.data.datasets.Rows`."""
        return self._rows.blocks

    def datum(self, index: int) -> Datum:
        """Row ``index``.

        Raises:
            DataError: the row is malformed or too long; names the file and the row.
        """
        row = self._rows[index]
        return _at(self._rows, index, lambda: self._datum(row))

    def _datum(self, row: Row) -> Datum:
        if "messages" in row:
            messages = _messages(row, "messages")
        else:
            messages = [*_turns(row, "prompt", "user"), *_turns(row, "completion", "assistant")]
        return conversation_datum(
            self._chat, messages, _tools(row), max_tokens=self._max_tokens, too_long=self._too_long
        )


class Preferences:
    """A data set of preferences as pairs of datums; arguments and errors as :class:`Demonstrations`."""

    def __init__(self, rows: Rows, chat: Chat, *, max_tokens: int, too_long: TooLong = "error") -> None:
        chat.check_training()
        self._rows = rows
        self._chat = chat
        self._max_tokens = max_tokens
        self._too_long = too_long

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def blocks(self) -> Sequence[int] | None:
        """See :class:`framework.data.datasets.Rows`."""
        return self._rows.blocks

    def pair(self, index: int) -> PreferencePair:
        """Row ``index``.

        Raises:
            DataError: the row is malformed or too long; names the file and the row.
        """
        row = self._rows[index]
        return _at(self._rows, index, lambda: self._pair(row))

    def _pair(self, row: Row) -> PreferencePair:
        chosen, rejected = _turns(row, "chosen", "assistant"), _turns(row, "rejected", "assistant")
        if "prompt" in row:
            prompt = _turns(row, "prompt", "user")
        else:
            num_shared = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), -1)
            if num_shared < 1:
                raise DataError("without 'prompt', 'chosen' and 'rejected' must begin alike and end differently")
            prompt, chosen, rejected = chosen[:num_shared], chosen[num_shared:], rejected[num_shared:]
        return PreferencePair(chosen=self._answer(prompt, chosen, row), rejected=self._answer(prompt, rejected, row))

    def _answer(self, prompt: Sequence[Message], answer: Sequence[Message], row: Row) -> Datum:
        datum = conversation_datum(
            self._chat, [*prompt, *answer], _tools(row), max_tokens=self._max_tokens, too_long=self._too_long
        )
        start = len(self._chat.prompt(prompt, _tools(row)).token_ids)
        mask = tuple(trained and place >= start for place, trained in enumerate(datum.loss_mask))
        return Datum(token_ids=datum.token_ids, loss_mask=mask)


def conversation_datum(
    chat: Chat,
    messages: Sequence[Message],
    tools: Tools | None = None,
    *,
    max_tokens: int,
    too_long: TooLong = "error",
) -> Datum:
    """One conversation; the loss mask is True on what the assistant said.

    Raises:
        DataError: as :meth:`Chat.training_tokens`, or it is too long.
    """
    tokens = chat.training_tokens(messages, tools)
    if len(tokens.token_ids) > max_tokens and too_long == "error":
        raise DataError(
            f"the conversation has {len(tokens.token_ids)} tokens, at most {max_tokens} are allowed; "
            "raise data.max_tokens, or set data.too_long=truncate"
        )
    return Datum(token_ids=tokens.token_ids[:max_tokens], loss_mask=tokens.loss_mask[:max_tokens])


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthReport:
    """How long datums are and how well they fill microbatches. Lengths are in tokens."""

    num_datums: int
    num_tokens: int
    num_trained_tokens: int
    shortest: int
    median: int
    p95: int
    longest: int
    num_at_limit: int
    """Datums of exactly the maximal length: those that were cut, if any were."""
    num_microbatches: int
    fill: float
    """Tokens over the token budget of all microbatches, in (0, 1]."""

    def __str__(self) -> str:
        return (
            f"{self.num_datums} datums, {self.num_tokens} tokens ({self.num_trained_tokens} trained); length "
            f"{self.shortest} to {self.longest}, median {self.median}, 95% up to {self.p95}, {self.num_at_limit} at "
            f"the limit; {self.num_microbatches} microbatches, {self.fill:.0%} full"
        )


def length_report(datums: Sequence[Datum], *, max_tokens: int, max_tokens_per_microbatch: int) -> LengthReport:
    """Measures ``datums``, packed as the trainer packs them.

    Args:
        datums: at least one; of a large data set a sample.
        max_tokens: of one datum.
        max_tokens_per_microbatch: as in the trainer's configuration.
    """
    lengths = sorted(len(datum.token_ids) for datum in datums)
    batch = pack([shift(datum) for datum in datums], max_tokens=max_tokens_per_microbatch)
    num_microbatches = len(batch.microbatches)
    num_inputs = sum(length - 1 for length in lengths)
    return LengthReport(
        num_datums=len(datums),
        num_tokens=sum(lengths),
        num_trained_tokens=sum(sum(datum.loss_mask) for datum in datums),
        shortest=lengths[0],
        median=int(np.percentile(lengths, 50, method="lower")),
        p95=int(np.percentile(lengths, 95, method="higher")),
        longest=lengths[-1],
        num_at_limit=sum(length == max_tokens for length in lengths),
        num_microbatches=num_microbatches,
        fill=num_inputs / (num_microbatches * max_tokens_per_microbatch),
    )


def _at(rows: Rows, index: int, make: Callable[[], T]) -> T:
    """``make()``, its DataError preceded by file and row."""
    try:
        return make()
    except DataError as error:
        raise DataError(f"{rows.where(index)}: {error}") from error


def _messages(row: Row, key: str) -> list[Message]:
    value = row[key]
    check_messages(value)
    assert isinstance(value, Sequence)
    # Parquet gives every message the same keys, those it lacks as None.
    return [{name: part for name, part in message.items() if part is not None} for message in value]


def _turns(row: Row, key: str, role: str) -> list[Message]:
    """A column that is a string, said by ``role``, or a list of messages."""
    if key not in row:
        raise DataError(f"needs {key!r}; it has the keys {sorted(row)}")
    value = row[key]
    if not isinstance(value, str):
        return _messages(row, key)
    if not value:
        raise DataError(f"{key!r} is empty")
    return [{"role": role, "content": value}]


def _tools(row: Row) -> Tools | None:
    tools = row.get("tools")
    if tools is None:
        return None
    if not isinstance(tools, Sequence) or isinstance(tools, str):
        raise DataError(f"'tools' must be a list of JSON schemas, is a {type(tools).__name__}")
    return tools
