"""Rewards: plain functions ``(completion: str, **row) -> float``, named in the config by their dotted path.

A row's keys are passed by name, so a reward names the columns it reads and takes the rest as ``**_``.
"""

from __future__ import annotations

import importlib

from framework.environments.base import Reward
from framework.errors import ConfigError


def exact_match(completion: str, *, answer: str, **_: object) -> float:
    """1.0 if the completion is the answer, white space around both aside; else 0.0."""
    return float(completion.strip() == answer.strip())


def load_reward(path: str) -> Reward:
    """The function at a dotted path such as ``framework.environments.rewards.exact_match``.

    Raises:
        ConfigError: no such module, no such name in it, or it is not callable.
    """
    module_name, _, name = path.rpartition(".")
    try:
        module = importlib.import_module(module_name)
        reward = getattr(module, name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"environment.reward={path!r}: not an importable function ({error})") from error
    if not callable(reward):
        raise ConfigError(f"environment.reward={path!r}: is a {type(reward).__name__}, must be a function")
    return reward  # type: ignore[no-any-return]
