"""What an environment and a reward are. An environment is single use: one object per rollout, no reset.

Tokens in, tokens out: an environment hands over token ids and receives token ids, so what the model generated is never
re-tokenised.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from framework.types import Completion, Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What the environment answers to one completion."""

    reward: float
    """Added to the rollout's reward; finite."""
    done: bool
    """True ends the rollout; otherwise :meth:`Environment.observe` is asked again."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Measured besides the reward, e.g. ``{"correct": 1.0}``; added over the turns."""


class Environment(Protocol):
    """One episode. Runs on tensor-parallel rank 0 only."""

    def observe(self) -> Prompt:
        """Every token the model is to continue: the conversation so far, as the model saw it, plus what is new.

        From the second turn on it starts with the previous prompt and completion, token for token.
        """

    def step(self, completion: Completion) -> StepResult: ...


class Problems(Protocol):
    """A source of problems: an indexable, deterministic collection that makes a fresh environment per rollout."""

    def __len__(self) -> int: ...

    def problem_id(self, index: int) -> str: ...

    def make(self, index: int) -> Environment:
        """A new environment for problem ``index``; called once per rollout of its group."""


Reward = Callable[..., float]
"""A plain function ``reward(completion: str, **row) -> float``, named in the config by its dotted path."""

Problem = Mapping[str, object]
"""One row of a data set; its keys are passed to the reward by name."""

Messages = Sequence[Mapping[str, str]]
"""Chat messages with ``role`` and ``content``."""
