"""Question, answer, reward: the environment of every task that ends after one completion."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from framework.data.chat import Chat, Message
from framework.environments.base import Problem, Reward, StepResult
from framework.errors import DataError, EnvironmentFailure
from framework.types import Completion, Prompt


class SingleTurn:
    """One prompt, one completion, one reward."""

    def __init__(self, *, chat: Chat, messages: Sequence[Message], row: Problem, reward: Reward) -> None:
        self._chat = chat
        self._messages = messages
        self._row = row
        self._reward = reward

    def __repr__(self) -> str:
        return f"SingleTurn(reward={_name(self._reward)})"

    def observe(self) -> Prompt:
        return self._chat.prompt(self._messages)

    def step(self, completion: Completion) -> StepResult:
        text = self._chat.text(completion)
        try:
            reward = self._reward(text, **self._row)
        except Exception as error:
            raise EnvironmentFailure(f"reward {_name(self._reward)} raised {error!r}") from error
        return StepResult(reward=reward, done=True)


class QuestionRows(Protocol):
    """Rows by number: a list, or a data set that reads them when asked."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, object]: ...


class SingleTurnProblems:
    """Rows of a data set as problems.

    A row needs ``question`` (a string, which becomes the user's message) or ``messages`` (the whole conversation);
    every key is passed to the reward by name.
    """

    def __init__(
        self,
        rows: QuestionRows,
        *,
        name: str,
        chat: Chat,
        reward: Reward,
        system: str | None = None,
    ) -> None:
        if not len(rows):
            raise DataError(f"environment {name!r} has no problems: the data set is empty")
        self._rows = rows
        self._name = name
        self._chat = chat
        self._reward = reward
        self._system = system

    def __repr__(self) -> str:
        return f"SingleTurnProblems({self._name}, {len(self._rows)} problems)"

    def __len__(self) -> int:
        return len(self._rows)

    def problem_id(self, index: int) -> str:
        return f"{self._name}/{index}"

    def make(self, index: int) -> SingleTurn:
        row = self._rows[index]
        return SingleTurn(chat=self._chat, messages=self._conversation(index, row), row=row, reward=self._reward)

    def _conversation(self, index: int, row: Mapping[str, object]) -> Sequence[Message]:
        messages = row.get("messages")
        if isinstance(messages, Sequence) and not isinstance(messages, str) and messages:
            return list(messages)
        question = row.get("question")
        if not isinstance(question, str) or not question:
            raise DataError(
                f"{self.problem_id(index)} (row {index}): needs 'question', a non-empty string, or 'messages', a "
                f"non-empty list; it has the keys {sorted(row)}"
            )
        system: list[Message] = [] if self._system is None else [{"role": "system", "content": self._system}]
        return [*system, {"role": "user", "content": question}]


def _name(function: Callable[..., object]) -> str:
    module = getattr(function, "__module__", "?")
    return f"{module}.{getattr(function, '__qualname__', repr(function))}"
