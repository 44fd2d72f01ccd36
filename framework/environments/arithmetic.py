"""The offline task of the default recipe: name the largest of a few two-digit numbers.

It needs no download, its prompts are about 50 tokens and its answers 3, a 135M model gets about one in five right, and
a policy that compares the numbers gets all of them. One solved example in the prompt shows the form of an answer.

Which numbers are in ``train`` and which in ``heldout`` follows from ``split_seed`` alone: a held-out problem is a set
of numbers that no training problem has, in any order.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from typing import Literal

from framework.data.chat import Chat, Message
from framework.environments.rewards import exact_match
from framework.environments.single_turn import SingleTurn
from framework.errors import ConfigError

Split = Literal["train", "heldout"]

HELDOUT_PERCENT = 20
_EXAMPLE = (27, 81, 46)


class ArithmeticProblems:
    """``Largest of 59, 63, 15?`` -> ``63``; reward 1.0 for exactly the answer, else 0.0.

    Example:
        problems = ArithmeticProblems(chat, split="train", size=1000, seed=0)
        problems.row(0)  # {"question": "Largest of 59, 63, 15?", "answer": "63"}
    """

    def __init__(self, chat: Chat, *, split: Split, size: int, seed: int, split_seed: int = 0) -> None:
        if split not in ("train", "heldout"):
            raise ConfigError(f"environment split={split!r}: must be 'train' or 'heldout'")
        if not 1 <= size <= 10_000:
            raise ConfigError(f"environment size={size}: must be between 1 and 10000")
        self._chat = chat
        self._split = split
        self._rows = _draw(split=split, size=size, seed=seed, split_seed=split_seed)

    def __repr__(self) -> str:
        return f"ArithmeticProblems({self._split}, {len(self._rows)} problems)"

    def __len__(self) -> int:
        return len(self._rows)

    def problem_id(self, index: int) -> str:
        return f"arithmetic/{self._split}/{index}"

    def row(self, index: int) -> Mapping[str, str]:
        """The question and its answer."""
        numbers = self._rows[index]
        return {"question": _question(numbers), "answer": str(max(numbers))}

    def make(self, index: int) -> SingleTurn:
        row = self.row(index)
        messages: list[Message] = [
            {"role": "system", "content": ""},  # else SmolLM2's template adds its own, 20 tokens
            {"role": "user", "content": _question(_EXAMPLE)},
            {"role": "assistant", "content": str(max(_EXAMPLE))},
            {"role": "user", "content": row["question"]},
        ]
        return SingleTurn(chat=self._chat, messages=messages, row=row, reward=exact_match)


def arithmetic(
    chat: Chat, *, split: Split, seed: int, size: int | None = None, split_seed: int = 0
) -> ArithmeticProblems:
    """The builder of the catalog.

    Args:
        chat: renders the prompts.
        split: held-out problems are the same whatever ``seed``.
        seed: which problems ``train`` has, and their order.
        size: how many problems; None is 2000 to train on and 256 held out.
        split_seed: which sets of numbers are held out.
    """
    if split == "heldout":
        return ArithmeticProblems(chat, split=split, size=size or 256, seed=0, split_seed=split_seed)
    return ArithmeticProblems(chat, split=split, size=size or 2000, seed=seed, split_seed=split_seed)


def _question(numbers: tuple[int, ...]) -> str:
    return f"Largest of {', '.join(map(str, numbers))}?"


def _draw(*, split: Split, size: int, seed: int, split_seed: int) -> list[tuple[int, ...]]:
    """``size`` different triples of the split, in an order that follows from ``seed``."""
    rng = random.Random(f"{split}/{seed}")
    seen = {frozenset(_EXAMPLE)}
    rows: list[tuple[int, ...]] = []
    while len(rows) < size:
        numbers = tuple(rng.sample(range(10, 100), 3))
        members = frozenset(numbers)
        if members not in seen and _is_heldout(members, split_seed) == (split == "heldout"):
            seen.add(members)
            rows.append(numbers)
    return rows


def _is_heldout(members: frozenset[int], split_seed: int) -> bool:
    """A stable hash of the set of numbers, so that train and held-out problems never meet."""
    text = f"{split_seed}/{sorted(members)}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") % 100 < HELDOUT_PERCENT
