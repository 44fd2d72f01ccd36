"""The sums, counts and names of metrics."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from framework.algorithms.base import Metric
from framework.errors import ConfigError
from framework.metrics import check_metrics, merge_metrics, reduce_metrics


def test_a_mean_is_weighted_by_its_counts_not_by_its_parts() -> None:
    parts = [{"loss/kl": Metric(sum=6.0, count=3)}, {"loss/kl": Metric(sum=1.0, count=1)}]
    assert reduce_metrics(parts) == {"loss/kl": 7.0 / 4.0}  # the mean of means would be 1.5


def test_sums_may_be_tensors_and_a_metric_may_miss_in_a_part() -> None:
    parts = [
        {"loss/kl": Metric(sum=torch.tensor(2.0), count=torch.tensor(4.0))},
        {"loss/kl": Metric(sum=torch.tensor(1.0), count=2), "loss/clip_fraction": Metric(sum=1, count=2)},
    ]
    assert reduce_metrics(parts) == {"loss/clip_fraction": 0.5, "loss/kl": 0.5}


def test_ranks_are_added_in_one_call_in_the_order_of_names() -> None:
    calls: list[list[float]] = []

    def with_another_rank(values: list[float]) -> list[float]:
        calls.append(values)
        return [mine + other for mine, other in zip(values, [10.0, 2.0, 30.0, 6.0], strict=True)]

    parts = [{"reward/mean": Metric(sum=3.0, count=2.0), "loss/kl": Metric(sum=1.0, count=1.0)}]
    assert reduce_metrics(parts, global_sum=with_another_rank) == {"loss/kl": 11.0 / 3.0, "reward/mean": 33.0 / 8.0}
    assert calls == [[1.0, 1.0, 3.0, 2.0]]


def test_what_only_another_rank_measured_is_in_the_mean_and_in_its_place() -> None:
    """This rank has reward/env/a and time/x_s, the other reward/env/b and time/x_s: the lists must line up."""
    sent: list[list[float]] = []

    def with_another_rank(values: list[float]) -> list[float]:
        sent.append(values)
        return [a + b for a, b in zip(values, [0.0, 0.0, 6.0, 2.0, 3.0, 1.0], strict=True)]

    parts = [{"reward/env/a": Metric(sum=1.0, count=2.0), "time/x_s": Metric(sum=1.0, count=1.0)}]
    means = reduce_metrics(
        parts, global_sum=with_another_rank, gather=lambda names: [names, ["reward/env/b", "time/x_s"]]
    )
    assert sent == [[1.0, 2.0, 0.0, 0.0, 1.0, 1.0]]
    assert means == {"reward/env/a": 0.5, "reward/env/b": 3.0, "time/x_s": 2.0}


def test_what_nothing_was_counted_for_has_no_mean() -> None:
    assert reduce_metrics([{"loss/kl": Metric(sum=0.0, count=0.0)}]) == {}


def test_merging_changes_no_part() -> None:
    part = {"loss/kl": Metric(sum=torch.ones(()), count=1)}
    merge_metrics([part, part, part])
    assert part["loss/kl"].sum == 1.0


@pytest.mark.parametrize("name", ["reward", "Reward/mean", "reward/", "reward/Mean", "speed/tokens", "reward/mean std"])
def test_a_badly_named_metric_is_refused_by_name(name: str) -> None:
    with pytest.raises(ConfigError, match="lower-case") as caught:
        check_metrics({"reward/mean": 1.0, name: 1.0})
    assert repr(name) in str(caught.value)


def test_good_names_pass_and_become_floats() -> None:
    checked = check_metrics({"time/push_s": np.float64(2.5), "eval/arithmetic/accuracy@1": 1})
    assert checked == {"time/push_s": 2.5, "eval/arithmetic/accuracy@1": 1.0}
    assert all(type(value) is float for value in checked.values())
