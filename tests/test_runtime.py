"""The runtime of a recipe: the engine sleeps where the memory was divided so, and only there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from framework.runtime import SamplingRuntime


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
