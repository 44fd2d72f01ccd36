"""Metrics as (sum, count) until the last moment: added over microbatches and ranks, divided once, names checked.

Trainers and recipes use it; tracking.py shows the result.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

from framework.algorithms.base import Metric
from framework.errors import ConfigError

SECTIONS = (
    "reward",
    "advantage",
    "environment",
    "time",
    "sync",
    "parity",
    "loss",
    "policy",
    "optim",
    "rollout",
    "eval",
    "memory",
)
"""What may stand before the slash of a metric's name; wandb and TensorBoard show one panel group for each."""

_METRIC_NAME = re.compile(rf"({'|'.join(SECTIONS)})(/[a-z0-9_@.\-]+)+")


def merge_metrics(parts: Iterable[Mapping[str, Metric]]) -> dict[str, Metric]:
    """Adds (sum, count) pairs of the same name, e.g. over the microbatches of one call.

    Example: ``{"a/b": (6, 3)}`` and ``{"a/b": (1, 1)}`` give ``{"a/b": (7, 4)}``.
    """
    total: dict[str, Metric] = {}
    for part in parts:
        for name, metric in part.items():
            so_far = total.get(name, Metric(sum=0.0, count=0.0))
            total[name] = Metric(sum=so_far.sum + metric.sum, count=so_far.count + metric.count)
    return total


def reduce_metrics(
    parts: Iterable[Mapping[str, Metric]],
    *,
    global_sum: Callable[[list[float]], list[float]] = lambda values: values,
    gather: Callable[[list[str]], list[list[str]]] = lambda names: [names],
) -> dict[str, float]:
    """Means over all microbatches and ranks: the one place where a sum is divided by its count.

    Args:
        parts: one mapping per microbatch or call of this rank.
        global_sum: adds equally long lists elementwise over the data-parallel group. Called once by every rank.
        gather: every rank's names; for parts whose names may differ between ranks, such as an environment's metrics,
            which not every rollout has. Without it all ranks must have the same names.

    Returns:
        Name to mean, sorted by name; a metric whose count is 0 everywhere is left out.
    """
    merged = merge_metrics(parts)
    names = sorted(set().union(*gather(sorted(merged))))
    absent = Metric(sum=0.0, count=0.0)
    mine = [merged.get(name, absent) for name in names]
    flat = [float(value) for metric in mine for value in (metric.sum, metric.count)]
    summed = global_sum(flat)
    assert len(summed) == len(flat), "global_sum must return as many numbers as it was given"
    pairs = zip(names, summed[0::2], summed[1::2], strict=True)
    return {name: total / count for name, total, count in pairs if count != 0}


def check_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics as Python floats.

    Raises:
        ConfigError: a name is not ``area/what`` in lower case with an area of :data:`SECTIONS`.
    """
    for name in metrics:
        if not _METRIC_NAME.fullmatch(name):
            raise ConfigError(
                f"metric {name!r}: a name must be area/what in lower-case letters, digits, _ . - or @, "
                f"with area one of {list(SECTIONS)}"
            )
    return {name: float(value) for name, value in metrics.items()}
