"""Any data set of reasoning-gym by its name: problems made on the spot, judged by the data set's own verifier.

Rows are made when they are asked for, from the seed and their number. A held-out problem is one whose question the
training set of the same seed does not have.
"""

from __future__ import annotations

import difflib
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from framework.data.chat import Chat, Message
from framework.environments.base import StepResult
from framework.errors import ConfigError, EnvironmentFailure
from framework.types import Completion, Prompt

HELDOUT_SEED_OFFSET = 1_000_003
TAGGED = "Think if it helps, then give the final answer, and only that, between <answer> and </answer>."


class ReasoningGymProblems:
    """Problems of one data set.

    Args:
        chat: renders the prompts.
        dataset: a ``ProceduralDataset``.
        name: its name.
        indices: which of its rows.
        split: for the problem's id.
        opening: what every prompt begins with, before the question.
        tag: the completion's answer is what stands between ``<tag>`` and ``</tag>`` last; None takes all of it.
    """

    def __init__(
        self,
        chat: Chat,
        dataset: Any,
        *,
        name: str,
        indices: range | list[int],
        split: str,
        opening: Sequence[Message],
        tag: str | None,
    ) -> None:
        self._chat = chat
        self._dataset = dataset
        self._name = name
        self._indices = indices
        self._split = split
        self._opening = opening
        self._tag = tag

    def __repr__(self) -> str:
        return f"ReasoningGymProblems({self._name}, {self._split}, {len(self)} problems)"

    def __len__(self) -> int:
        return len(self._indices)

    def problem_id(self, index: int) -> str:
        return f"{self._name}/{self._split}/{index}"

    def entry(self, index: int) -> Mapping[str, Any]:
        """``question``, ``answer`` (of some data sets one of many right ones) and ``metadata``."""
        entry: Mapping[str, Any] = self._dataset[self._indices[index]]
        return entry

    def make(self, index: int) -> ReasoningGymEnvironment:
        return ReasoningGymEnvironment(
            self._chat, self._dataset, self.entry(index), name=self._name, opening=self._opening, tag=self._tag
        )


class ReasoningGymEnvironment:
    """One question; the reward is the verifier's score, metric ``correct`` is 1.0 where that is full."""

    def __init__(
        self,
        chat: Chat,
        dataset: Any,
        entry: Mapping[str, Any],
        *,
        name: str,
        opening: Sequence[Message],
        tag: str | None,
    ) -> None:
        self._chat = chat
        self._dataset = dataset
        self._entry = entry
        self._name = name
        self._opening = opening
        self._tag = tag

    def __repr__(self) -> str:
        return f"ReasoningGymEnvironment({self._name})"

    def observe(self) -> Prompt:
        return self._chat.prompt([*self._opening, {"role": "user", "content": self._entry["question"]}])

    def step(self, completion: Completion) -> StepResult:
        from reasoning_gym.utils import extract_answer

        text = self._chat.text(completion)
        answer = text.strip() if self._tag is None else extract_answer(text, tag_name=self._tag)
        score = self._dataset.score_answer(answer, self._entry)
        if not isinstance(score, int | float) or not math.isfinite(score):
            raise EnvironmentFailure(f"the verifier of {self._name} gave {score!r} for {answer!r}")
        return StepResult(reward=float(score), done=True, metrics={"correct": float(score >= 1.0)})


def reasoning_gym(
    chat: Chat,
    *,
    split: str,
    seed: int,
    dataset: str,
    size: int = 2000,
    heldout_size: int = 256,
    system: str | None = TAGGED,
    tag: str | None = "answer",
    examples: int = 0,
    config: Mapping[str, Any] | None = None,
) -> ReasoningGymProblems:
    """The builder of the catalog.

    Args:
        chat: renders the prompts.
        split: ``train`` or ``heldout``.
        seed: of the problems.
        dataset: a name of reasoning-gym's, e.g. ``chain_sum``, ``countdown``, ``sokoban``.
        size: problems to train on.
        heldout_size: problems held out; fewer where the data set has no more that training does not have.
        system: the system message; null for none.
        tag: null takes the whole completion as the answer; set ``system`` to fit.
        examples: solved problems that every prompt shows first, neither trained on nor held out. A small model that
            never answers in the asked form has nothing to learn from.
        config: the data set's own settings, e.g. ``{min_terms: 2, max_terms: 3}``.

    Raises:
        ConfigError: no such data set, settings that it refuses, or no answers to show.
    """
    if not isinstance(examples, int) or examples < 0:
        raise ConfigError(f"environment.args.examples={examples}: must be a number of problems, 0 or more")
    train = _create(dataset, seed=seed, size=size + examples, config=config or {})
    told: list[Message] = [{"role": "system", "content": system}] if system is not None else []
    opening = [*told, *_solved(train, range(size, size + examples), dataset, tag)]
    if split == "train":
        return ReasoningGymProblems(
            chat, train, name=dataset, indices=range(size), split=split, opening=opening, tag=tag
        )
    known = {train[index]["question"] for index in range(size + examples)}
    # Twice as many as asked for: of small data sets most questions are known already.
    heldout = _create(dataset, seed=seed + HELDOUT_SEED_OFFSET, size=2 * heldout_size, config=config or {})
    fresh = {heldout[index]["question"]: index for index in reversed(range(2 * heldout_size))}
    indices = sorted(index for question, index in fresh.items() if question not in known)[:heldout_size]
    if not indices:
        raise ConfigError(
            f"environment.args: reasoning-gym's {dataset} has no problem that the {size} to train on do not have; "
            "lower size, or make its config harder"
        )
    return ReasoningGymProblems(chat, heldout, name=dataset, indices=indices, split=split, opening=opening, tag=tag)


def _solved(dataset: Any, indices: range, name: str, tag: str | None) -> list[Message]:
    turns: list[Message] = []
    for index in indices:
        entry = dataset[index]
        if entry["answer"] is None:
            raise ConfigError(f"environment.args.examples: {name} of reasoning-gym names no answer; use examples=0")
        answer = str(entry["answer"])
        turns.append({"role": "user", "content": entry["question"]})
        turns.append({"role": "assistant", "content": answer if tag is None else f"<{tag}>{answer}</{tag}>"})
    return turns


def _create(name: str, *, seed: int, size: int, config: Mapping[str, Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # in cellpylib 2.4, imported by reasoning-gym 0.1
        import reasoning_gym as gym
        from reasoning_gym.factory import DATASETS
    if name not in DATASETS:
        close = difflib.get_close_matches(name, DATASETS, n=3, cutoff=0.4)
        hint = f", did you mean {' or '.join(close)}?" if close else ""
        raise ConfigError(f"environment.args.dataset={name}: reasoning-gym has no such data set{hint}")
    try:
        return gym.create_dataset(name, seed=seed, size=size, **config)
    except (TypeError, ValueError, AssertionError) as error:
        raise ConfigError(f"environment.args.config={dict(config)}: {name} of reasoning-gym says: {error}") from error
