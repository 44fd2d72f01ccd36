"""Rewards: plain functions ``(completion: str, **row) -> float``, named in the config by their dotted path.

A row's keys are passed by name, so a reward names the columns it reads and takes the rest as ``**_``. What a reward
needs besides is bound by ``environment.reward_args``. All here are 1.0 or 0.0 and look at text only; rewards that need
a process or a server of their own have files of their own (math.py, judge.py, code.py).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

import regex  # type: ignore[import-untyped]  # its stubs are a package of their own

REGEX_TIMEOUT_S = 1.0
"""A pattern that backtracks longer than this does not match."""

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")
_FENCE = re.compile(r"```(?:json)?\s*\n(.*?)```", re.DOTALL)


def exact_match(completion: str, *, answer: str, **_: object) -> float:
    """1.0 if the completion is the answer, white space around both aside; else 0.0."""
    return float(completion.strip() == answer.strip())


def contains(completion: str, *, answer: str, **_: object) -> float:
    """1.0 if the answer stands in the completion as words of its own, in any case of letters; else 0.0."""
    return float(re.search(rf"(?<!\w){re.escape(answer.strip())}(?!\w)", completion, re.IGNORECASE) is not None)


def regex_match(completion: str, *, pattern: str, **_: object) -> float:
    """1.0 if the whole completion, white space around it aside, matches the pattern; else 0.0.

    Args:
        completion: what the model said.
        pattern: as the ``regex`` package reads it; ``.`` matches line breaks.
    """
    try:
        found = regex.fullmatch(pattern, completion.strip(), flags=regex.DOTALL, timeout=REGEX_TIMEOUT_S)
    except TimeoutError:
        return 0.0
    return float(found is not None)


def json_schema(completion: str, *, schema: Mapping[str, Any] | str, **_: object) -> float:
    """1.0 if the completion, or its one fenced block, is JSON that the schema admits; else 0.0.

    Args:
        completion: what the model said.
        schema: a JSON schema, as an object or as text.

    Raises:
        jsonschema.SchemaError: the schema itself is wrong.
    """
    import jsonschema

    rules = json.loads(schema) if isinstance(schema, str) else schema
    blocks = _FENCE.findall(completion)
    try:
        value = json.loads(blocks[0] if len(blocks) == 1 else completion)
    except (ValueError, RecursionError):
        return 0.0
    try:
        jsonschema.validate(value, rules)
    except jsonschema.ValidationError:
        return 0.0
    return 1.0


def last_number(completion: str, *, answer: str, **_: object) -> float:
    """1.0 if the last number in the completion equals the answer; else 0.0. Thousands' commas are ignored."""
    found = _NUMBER.findall(completion)
    return float(bool(found) and math.isclose(_number(found[-1]), _number(answer), rel_tol=1e-9, abs_tol=1e-12))


def _number(text: str) -> float:
    return float(text.replace(",", "").strip().rstrip("."))
