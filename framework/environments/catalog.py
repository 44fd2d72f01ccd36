"""Environments by name: one explicit dict, and the configuration that chooses from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from framework.data.chat import Chat
from framework.environments.arithmetic import ArithmeticProblems
from framework.environments.base import Problems
from framework.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvironmentConfig:
    """The ``environment`` group of the configuration."""

    name: str = "arithmetic"
    """A key of :data:`ENVIRONMENTS`."""
    args: dict[str, Any] = field(default_factory=dict)
    """Given to the environment's builder."""


def _arithmetic(chat: Chat, split: str, seed: int, args: Mapping[str, Any]) -> Problems:
    return ArithmeticProblems(chat, split=split, size=1000 if split == "train" else 256, seed=seed, **args)  # type: ignore[arg-type]


ENVIRONMENTS: dict[str, Callable[[Chat, str, int, Mapping[str, Any]], Problems]] = {"arithmetic": _arithmetic}


def build_problems(config: EnvironmentConfig, chat: Chat, *, split: str, seed: int) -> Problems:
    """The problems of one split, ``train`` or ``heldout``."""
    if config.name not in ENVIRONMENTS:
        raise ConfigError(f"environment.name={config.name!r}: must be one of {sorted(ENVIRONMENTS)}")
    return ENVIRONMENTS[config.name](chat, split, seed, config.args)
