"""Steps scheduled and recorded in one pass are vLLM's own steps: same schedule, same state, same results."""

from __future__ import annotations

from typing import Any

import pytest

from framework.engine.vllm.decode_records import in_use
from tests.engine.vllm.scheduling import Side, arrivals, engine_config


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return engine_config(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("in_flight", [1, 2])
@pytest.mark.parametrize("blocks", [60, 20])
def test_every_step_is_vllms(config: Any, blocks: int, in_flight: int) -> None:
    """With blocks for all, and with so few that requests are preempted and start again."""
    plain, fast = (Side(config, blocks=blocks, in_flight=in_flight, fast=fast) for fast in (False, True))
    results = preempted = 0
    for number in range(400):
        for side in (plain, fast):
            arrivals(side, number)
        expected = plain.step()
        assert fast.step() == expected, number
        results += len(expected[1] or ())
        preempted += expected[0]["preempted_req_ids"] != "set()"
    assert not plain.scheduler.requests
    assert bool(preempted) == (blocks < 60)
    assert results > 60
    assert sum(fast.others) < 0.5 * sum(plain.others), "hardly a request was recorded here"


def test_adapters_in_use_are_a_set_without_none() -> None:
    first, second = object(), object()
    request_of = {"a": first, "b": second, "c": first}
    assert in_use(request_of, ["a", "b", "c", "base"]) == {first, second}
    assert in_use(request_of, ["base"]) == set()
