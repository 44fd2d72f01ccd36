"""Dataclasses from plain containers: unknown keys and wrong types are errors that say what is allowed."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints

from framework.errors import ConfigError


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a message that names what was probably meant; empty if nothing is near."""
    close = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.4)
    return f"; did you mean {close[0]!r}?" if close else ""


def build(kind: Any, values: Any, path: str) -> Any:
    """An instance of the dataclass ``kind`` from a mapping.

    Args:
        kind: its fields' types are dataclasses, tuples, literals, optionals and plain types.
        values: a mapping; keys that it lacks have their defaults.
        path: of the mapping, with a dot at its end, for messages; empty at the top.

    Raises:
        ConfigError: a key is unknown (the nearest known one is named) or a value has the wrong type.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path.rstrip('.')}={values!r}: must be a section with keys, not a value")
    hints = get_type_hints(kind)
    unknown = [key for key in values if key not in hints]
    if unknown:
        raise ConfigError(f"unknown key {path + str(unknown[0])!r}{nearest(str(unknown[0]), hints)}")
    return kind(**{key: _convert(hints[key], value, path + key) for key, value in values.items()})


def _convert(hint: Any, value: Any, path: str) -> Any:
    """``value`` as the annotated type, or a ConfigError that says what is allowed."""
    origin = get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        options = get_args(hint)
        if value is None and type(None) in options:
            return None
        return _convert(next(option for option in options if option is not type(None)), value, path)
    if dataclasses.is_dataclass(hint):
        return build(hint, value, path + ".")
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{path}={value!r}: must be a list")
        return tuple(_convert(get_args(hint)[0], item, path) for item in value)
    if origin is Literal:
        if value not in get_args(hint):
            raise ConfigError(f"{path}={value!r}: must be one of {list(get_args(hint))}")
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, str):  # YAML 1.1 reads 1e-4 as text
        try:
            return float(value)
        except ValueError as error:
            raise ConfigError(f"{path}={value!r}: must be a number") from error
    if isinstance(hint, type) and (not isinstance(value, hint) or (hint is int and isinstance(value, bool))):
        raise ConfigError(f"{path}={value!r}: must be of type {hint.__name__}, not {type(value).__name__}")
    return value
