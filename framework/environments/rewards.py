"""Rewards: plain functions ``(completion: str, **row) -> float``, named in the config by their dotted path.

A row's keys are passed by name, so a reward names the columns it reads and takes the rest as ``**_``.
"""

from __future__ import annotations


def exact_match(completion: str, *, answer: str, **_: object) -> float:
    """1.0 if the completion is the answer, white space around both aside; else 0.0."""
    return float(completion.strip() == answer.strip())
