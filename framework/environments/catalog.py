"""Every environment by name: one explicit dict, and how its configuration becomes problems.

``environment.name`` is a key of :data:`ENVIRONMENTS` or the dotted path of a builder of your own, ``environment.args``
are the builder's keyword arguments, ``environment.reward`` the dotted path of a reward. The files in
``conf/environment`` say only what differs from a builder's defaults.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, get_args

from framework.data.chat import Chat
from framework.environments.arithmetic import arithmetic
from framework.environments.base import Problems, Reward
from framework.environments.calculator import calculator
from framework.environments.code import code
from framework.environments.question_answer import dataset, gsm8k, math
from framework.environments.reasoning_gym import reasoning_gym
from framework.environments.verifiers import verifiers
from framework.errors import ConfigError

Split = Literal["train", "heldout"]

Builder = Callable[..., Problems]
"""``build(chat, *, split, seed, **args) -> Problems``. One that takes ``reward`` lets the configuration choose it."""

ENVIRONMENTS: Mapping[str, Builder] = {
    "arithmetic": arithmetic,
    "calculator": calculator,
    "reasoning_gym": reasoning_gym,
    "dataset": dataset,
    "gsm8k": gsm8k,
    "math": math,
    "code": code,
    "verifiers": verifiers,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvironmentConfig:
    """The ``environment`` group of the configuration."""

    name: str = "arithmetic"
    """A key of :data:`ENVIRONMENTS`, or the dotted path of a :data:`Builder`."""
    args: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the builder, besides chat, split, seed and reward."""
    reward: str | None = None
    """Dotted path of a function ``reward(completion, **row) -> float``, or of a class whose instances are such; null
    keeps the environment's own."""
    reward_args: dict[str, Any] = field(default_factory=dict)
    """Further keyword arguments of the function, or the arguments of the class."""

    def __post_init__(self) -> None:
        if self.name not in ENVIRONMENTS and "." not in self.name:
            raise ConfigError(
                f"environment.name={self.name}: unknown{_nearest(self.name, ENVIRONMENTS)}; one of "
                f"{', '.join(ENVIRONMENTS)}, or the dotted path of a builder"
            )


def check_environment(config: EnvironmentConfig) -> None:
    """Refuses what no builder would take. It needs no model, so a run asks before its engine starts.

    Raises:
        ConfigError: an unknown environment, argument or reward; the nearest known one is named.
    """
    parameters = inspect.signature(_builder(config.name)).parameters
    reserved = {"chat", "split", "seed", "reward"}
    allowed = [name for name in parameters if name not in reserved]
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    for key in config.args:
        if key in reserved or (key not in allowed and not takes_any):
            raise ConfigError(
                f"environment.args.{key}: environment {config.name} has no such argument"
                f"{_nearest(key, allowed)}; it has {allowed}"
            )
    if config.reward is not None:
        if "reward" not in parameters:
            raise ConfigError(
                f"environment.reward={config.reward}: environment {config.name} computes its own reward; "
                "remove the key, or use the environment 'dataset'"
            )
        _reward(config.reward)
    elif config.reward_args:
        raise ConfigError("environment.reward_args is set but environment.reward is not")
    missing = [
        name
        for name in allowed
        if parameters[name].default is inspect.Parameter.empty
        and parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
        and name not in config.args
    ]
    if missing:
        raise ConfigError(f"environment {config.name} needs environment.args.{missing[0]}")


def build_problems(config: EnvironmentConfig, chat: Chat, *, split: str, seed: int) -> Problems:
    """The problems of one split, ``train`` or ``heldout``. Called on the leader, or on every rank alike.

    Raises:
        ConfigError: as :func:`check_environment`, or an argument has a value that the builder refuses.
        DataError: the environment's data set cannot be read, or the chat template cannot serve it.
    """
    if split not in get_args(Split):
        raise ConfigError(f"split={split!r}: must be one of {list(get_args(Split))}")
    check_environment(config)
    args = dict(config.args)
    if config.reward is not None:
        args["reward"] = load_reward(config.reward, config.reward_args)
    return _builder(config.name)(chat, split=split, seed=seed, **args)


def load_reward(path: str, args: Mapping[str, Any]) -> Reward:
    """The reward at a dotted path such as ``framework.environments.rewards.exact_match``.

    Args:
        path: of a function, or of a class that is made with ``args``.
        args: bound to the function by name.

    Raises:
        ConfigError: nothing callable is there, or it does not take these arguments.
    """
    found = _reward(path)
    if not inspect.isclass(found):
        return partial(found, **args) if args else found
    try:
        reward = found(**args)
    except TypeError as error:
        raise ConfigError(f"environment.reward={path}: environment.reward_args={dict(args)}: {error}") from error
    assert callable(reward)
    return reward


def _reward(path: str) -> Callable[..., Any]:
    found = load("environment.reward", path)
    if not callable(found):
        raise ConfigError(f"environment.reward={path}: is a {type(found).__name__}, must be a function or a class")
    return found  # type: ignore[no-any-return]


def load(key: str, path: str) -> Any:
    """The object at a dotted path.

    Raises:
        ConfigError: there is none; names ``key``.
    """
    module_name, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{key}={path}: cannot import it ({error})") from error


def _builder(name: str) -> Builder:
    if name in ENVIRONMENTS:
        return ENVIRONMENTS[name]
    builder: Builder = load("environment.name", name)
    return builder


def _nearest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.4)
    return f", did you mean {close[0]}?" if close else ""
