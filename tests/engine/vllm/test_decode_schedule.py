"""Steps in which requests only go on are scheduled in one pass; test_decode_records.py compares them with vLLM's."""

from __future__ import annotations

from typing import Any

import pytest

from framework.engine.vllm.decode_schedule import one_pass
from tests.engine.vllm.scheduling import Side, engine_config


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return engine_config(tmp_path_factory.mktemp("model"))


def test_most_steps_are_scheduled_in_one_pass(config: Any) -> None:
    side = Side(config, blocks=60, in_flight=2, fast=False)
    asked: list[int] = []
    original = side.scheduler.schedule

    def counted(*args: Any) -> Any:
        asked.append(len(side.scheduler.running))
        return original(*args)

    side.scheduler.schedule = counted
    one_pass(side.scheduler)
    for name in "abc":
        side.add(name, [1, 2, 3], max_tokens=50)
    for _ in range(60):
        side.step()
    assert not side.scheduler.requests
    assert sum(n > 0 for n in asked) <= 4
