"""The runtime of a recipe: the engine sleeps where the memory was divided so; start-up ends with settle()."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from framework.runtime import SamplingRuntime, settle


class Sleeper:
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def sleep(self) -> None:
        self.told.append("sleep")

    def wake(self) -> None:
        self.told.append("wake")


def runtime(engine: Any, *, sleeps: bool) -> SamplingRuntime:
    unused: Any = None
    return SamplingRuntime(
        base=unused,
        trainer=unused,
        chat=unused,
        tracker=unused,
        run_dir=Path(),
        store=unused,
        resumed=None,
        engine=engine,
        weight_sync=unused,
        sleeps=sleeps,
    )


def test_the_engine_gives_its_cache_up_where_it_must() -> None:
    engine = Sleeper()
    rt = runtime(engine, sleeps=True)
    rt.sleep()
    rt.wake()
    assert engine.told == ["sleep", "wake"]


def test_the_engine_stays_awake_where_both_sides_fit() -> None:
    engine = Sleeper()
    rt = runtime(engine, sleeps=False)
    rt.sleep()
    rt.wake()
    assert engine.told == []


@pytest.fixture
def restored() -> Iterator[None]:
    threads, thresholds = torch.get_num_threads(), gc.get_threshold()
    yield
    torch.set_num_threads(threads)
    gc.set_threshold(*thresholds)
    gc.unfreeze()


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize(("host_threads", "expected"), [(1, 1), (None, 2)])
def test_a_device_may_ask_for_fewer_threads_on_the_host(host_threads: int | None, expected: int) -> None:
    torch.set_num_threads(2)
    settle(host_threads=host_threads)
    assert torch.get_num_threads() == expected
    assert gc.get_freeze_count() > 0
