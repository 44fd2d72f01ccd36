"""Environments from data sets of questions and answers: any file or hub data set, GSM8K and MATH.

They are builders for the catalog; what they build is :class:`framework.environments.single_turn.SingleTurnProblems`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from framework.data.chat import Chat
from framework.data.datasets import Row, Rows, open_rows
from framework.environments.base import Reward
from framework.environments.math_answers import MathVerify
from framework.environments.rewards import exact_match
from framework.environments.single_turn import SingleTurnProblems
from framework.errors import DataError

HELDOUT_EVERY = 10
"""Of a single file, which has no splits, every tenth row is held out."""
BOXED = "Think step by step, then put the final answer into \\boxed{}."


class ConvertedRows:
    """Some rows of a data set, each passed through a function when it is read."""

    def __init__(self, rows: Rows, indices: range | list[int], convert: Callable[[Row], Mapping[str, object]]) -> None:
        self._rows = rows
        self._indices = indices
        self._convert = convert

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Mapping[str, object]:
        number = self._indices[index]
        row = self._rows[number]
        try:
            return self._convert(row)
        except DataError as error:
            raise DataError(f"{self._rows.where(number)}: {error}") from error


def dataset(
    chat: Chat,
    *,
    split: str,
    seed: int,
    path: str,
    config: str | None = None,
    train_split: str = "train",
    heldout_split: str = "test",
    question: str = "question",
    answer: str = "answer",
    instruction: str | None = None,
    system: str | None = None,
    reward: Reward = exact_match,
) -> SingleTurnProblems:
    """Questions and answers from a JSONL or Parquet file, a folder of such, or the hub.

    Args:
        chat: renders the prompts.
        split: ``train`` or ``heldout``. Of a single file every tenth row is held out.
        seed: not used; the order is drawn elsewhere.
        path: as :func:`framework.data.datasets.open_rows`.
        config: of a hub data set.
        train_split: the data set's name for what is trained on.
        heldout_split: the data set's name for what is held out.
        question: the column with the question; a column ``messages`` is taken before it.
        answer: the column with the answer, given to the reward as ``answer``; all other columns by their names.
        instruction: a paragraph after every question.
        system: the system message.
        reward: from ``environment.reward``.
    """
    del seed

    def convert(row: Row) -> Mapping[str, object]:
        known: dict[str, object] = {**row}
        if "messages" not in row:
            known["question"] = _question(row, question, instruction)
        if answer in row:
            known["answer"] = row[answer] if isinstance(row[answer], str) else str(row[answer])
        return known

    return _problems(Path(path).stem, chat, reward, convert, split, path, config, train_split, heldout_split, system)


def gsm8k(
    chat: Chat,
    *,
    split: str,
    seed: int,
    path: str = "openai/gsm8k",
    config: str | None = "main",
    instruction: str | None = BOXED,
    system: str | None = None,
    reward: Reward | None = None,
) -> SingleTurnProblems:
    """Grade-school word problems (Cobbe et al. 2021): the answer is the number after ``####``, compared by math-verify.

    Args: as :func:`dataset`. ``path`` may be a folder with ``train*.jsonl`` and ``test*.jsonl``.
    """
    del seed

    def convert(row: Row) -> Mapping[str, object]:
        _, mark, number = _text(row, "answer").rpartition("####")
        if not mark:
            raise DataError("'answer' has no '####' before the final number")
        asked = _question(row, "question", instruction)
        return {"question": asked, "answer": number.strip().replace(",", "")}

    return _problems("gsm8k", chat, reward or MathVerify(), convert, split, path, config, "train", "test", system)


def math(
    chat: Chat,
    *,
    split: str,
    seed: int,
    path: str = "DigitalLearningGmbH/MATH-lighteval",
    config: str | None = "default",
    instruction: str | None = BOXED,
    system: str | None = None,
    reward: Reward | None = None,
) -> SingleTurnProblems:
    """Competition mathematics (Hendrycks et al. 2021): the answer is in the solution's last ``\\boxed{}``.

    Args: as :func:`dataset`. Rows have ``problem`` and ``solution``, or ``answer`` in its place.
    """
    del seed

    def convert(row: Row) -> Mapping[str, object]:
        gold = _text(row, "answer") if "answer" in row else last_boxed(_text(row, "solution"))
        return {"question": _question(row, "problem", instruction), "answer": gold, "level": row.get("level")}

    return _problems("math", chat, reward or MathVerify(), convert, split, path, config, "train", "test", system)


def last_boxed(solution: str) -> str:
    """What the last ``\\boxed{...}`` holds, braces within it balanced.

    Raises:
        DataError: there is none.
    """
    start = solution.rfind("\\boxed")
    match = re.match(r"\\boxed\s*\{", solution[start:]) if start >= 0 else None
    if match is None:
        raise DataError("'solution' has no \\boxed{} with the answer")
    depth = 0
    begin = start + match.end()
    for place in range(begin - 1, len(solution)):
        depth += {"{": 1, "}": -1}.get(solution[place], 0)
        if depth == 0:
            return solution[begin:place]
    raise DataError("'solution' has a \\boxed{ that is not closed")


def _problems(
    name: str,
    chat: Chat,
    reward: Reward,
    convert: Callable[[Row], Mapping[str, object]],
    split: str,
    path: str,
    config: str | None,
    train_split: str,
    heldout_split: str,
    system: str | None,
) -> SingleTurnProblems:
    indices: range | list[int]
    if Path(path).expanduser().is_file():
        rows = open_rows(path)
        held_out = range(HELDOUT_EVERY - 1, len(rows), HELDOUT_EVERY)
        indices = held_out if split == "heldout" else [i for i in range(len(rows)) if i not in held_out]
    else:
        rows = open_rows(path, split=train_split if split == "train" else heldout_split, config=config)
        indices = range(len(rows))
    converted = ConvertedRows(rows, indices, convert)
    return SingleTurnProblems(converted, name=f"{name}/{split}", chat=chat, reward=reward, system=system)


def _question(row: Row, column: str, instruction: str | None) -> str:
    asked = _text(row, column)
    return f"{asked}\n\n{instruction}" if instruction else asked


def _text(row: Row, column: str) -> str:
    value = row.get(column)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"needs {column!r}, a non-empty string; it has the keys {sorted(row)}")
    return value
