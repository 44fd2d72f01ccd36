"""The command line before Hydra sees it: spellings made alike, and a misspelt key or choice named with the nearest.

Hydra's own messages for these speak of struct flags and defaults lists, and come as several lines.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

from framework.config import flatten, schema
from framework.errors import ConfigError
from framework.typed import nearest

FREE = ("environment.args.", "environment.reward_args.")
"""Sections whose keys are an environment's or a reward's own; checked where it is made."""

WITH_VALUE = frozenset(
    {"--cfg", "-c", "--info", "-i", "--package", "-p"}
    | {"--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd", "--experimental-rerun"}
)
"""Hydra's options whose value is an argument of its own, as in ``--cfg job``."""


def with_prefixes(arguments: Sequence[str], groups: Iterable[str]) -> list[str]:
    """The arguments with the signs that Hydra wants: plus for a recipe and for keys that are not in the schema.

    Example: ``recipe=grpo`` and ``environment.args.size=9`` become ``+recipe=grpo`` and ``++environment.args.size=9``;
    ``+algorithm=gspo`` becomes ``algorithm=gspo``.
    """
    return [_with_prefix(argument, set(groups)) for argument in arguments]


def _with_prefix(argument: str, groups: set[str]) -> str:
    key = argument.partition("=")[0].lstrip("+")
    if "=" not in argument or argument.startswith(("-", "~")):
        return argument
    prefix = "++" if key.startswith(FREE) else "+" if key == "recipe" else ""
    return prefix + argument.lstrip("+") if prefix or key in groups or key == "resume" else argument


def check_overrides(arguments: Sequence[str], groups: Mapping[str, Iterable[str]], unused: Iterable[str] = ()) -> None:
    """Refuses a misspelt or useless key or choice on the command line, before Hydra sees it.

    Args:
        arguments: e.g. ``["+recipe=grpo", "algorithm=gspo", "optimizer.learning_rate=1e-3"]``.
        groups: folders of ``conf/``, which may be set without a dot, and the names of the files in each.
        unused: sections and keys that the chosen recipe does not read.

    Raises:
        ConfigError: naming the key or the choice, and the nearest one that exists.
    """
    defaults = schema()
    refused = set(unused)
    known = set(flatten(defaults)) | set(defaults) | set(groups)
    for before, argument in pairwise(["", *arguments]):
        if argument.startswith("-") or before in WITH_VALUE:
            continue
        if "=" not in argument and not argument.startswith("~"):
            raise ConfigError(f"{argument!r} is not key=value{nearest(argument.lstrip('+'), known)}")
        key, _, value = argument.partition("=")
        key = key.lstrip("+~")
        if key.startswith(("hydra.", *FREE)):
            continue
        if key not in known:
            raise ConfigError(f"unknown key {key!r} in {argument!r}{nearest(key, known)}")
        section = key.partition(".")[0]
        if section in refused or key in refused:
            what = f"the section {section!r}" if section in refused else f"{key!r}"
            raise ConfigError(f"{argument!r}: this recipe does not use {what}")
        if key in groups and value not in groups[key]:
            choices = sorted(groups[key])
            raise ConfigError(f"unknown {key} in {argument!r}{nearest(value, choices)}; one of {', '.join(choices)}")
