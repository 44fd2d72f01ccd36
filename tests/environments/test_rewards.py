"""Each text reward: what earns it and what does not, and that hostile completions neither raise nor hang."""

from __future__ import annotations

import time

import jsonschema
import pytest

from framework.environments.rewards import contains, exact_match, json_schema, last_number, regex_match


@pytest.mark.parametrize(
    ("said", "answer", "reward"),
    [("4", "4", 1.0), (" 4\n", "4 ", 1.0), ("4.", "4", 0.0), ("", "4", 0.0), ("Four", "four", 0.0)],
)
def test_exact_match(said: str, answer: str, reward: float) -> None:
    assert exact_match(said, answer=answer, question="ignored") == reward


@pytest.mark.parametrize(
    ("said", "answer", "reward"),
    [("It is Paris.", "paris", 1.0), ("Parisian", "Paris", 0.0), ("a+b", "a+b", 1.0), ("14", "4", 0.0)],
)
def test_contains(said: str, answer: str, reward: float) -> None:
    assert contains(said, answer=answer) == reward


@pytest.mark.parametrize(
    ("said", "pattern", "reward"),
    [("ab\ncd", "ab.cd", 1.0), ("xab", "ab", 0.0), (" 12 ", r"\d+", 1.0), ("", ".+", 0.0)],
)
def test_regex_match(said: str, pattern: str, reward: float) -> None:
    assert regex_match(said, pattern=pattern) == reward


def test_a_pattern_that_backtracks_for_ever_does_not_match() -> None:
    started = time.monotonic()
    assert regex_match("a" * 60 + "!", pattern=r"(a|aa)+$") == 0.0
    assert time.monotonic() - started < 60


POINT = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"], "additionalProperties": False}


@pytest.mark.parametrize(
    ("said", "reward"),
    [
        ('{"x": 3}', 1.0),
        ('Here:\n```json\n{"x": 3}\n```\nDone.', 1.0),
        ('{"x": "3"}', 0.0),
        ('{"x": 3, "y": 4}', 0.0),
        ('Here: {"x": 3}', 0.0),
        ("", 0.0),
        ("[" * 100_000, 0.0),
    ],
)
def test_json_schema(said: str, reward: float) -> None:
    assert json_schema(said, schema=POINT) == reward


def test_a_schema_can_be_text_and_a_wrong_one_is_an_error() -> None:
    assert json_schema("3", schema='{"type": "integer"}') == 1.0
    with pytest.raises(jsonschema.SchemaError):
        json_schema("3", schema={"type": "no such type"})


@pytest.mark.parametrize(
    ("said", "answer", "reward"),
    [
        ("So 3 + 4 = 7 apples", "7", 1.0),
        ("It costs $1,234.50.", "1234.5", 1.0),
        ("-5", "-5.0", 1.0),
        ("7 or 8", "7", 0.0),
        ("none", "7", 0.0),
        ("7.", "7", 1.0),
        ("8", "1,000", 0.0),
    ],
)
def test_last_number(said: str, answer: str, reward: float) -> None:
    assert last_number(said, answer=answer) == reward
