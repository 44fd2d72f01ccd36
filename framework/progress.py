"""What a run carries from step to step, and how it is saved and taken up again.

A checkpoint holds the adapter's masters, Adam moments, step and dropout counters, every rank's random states, the data
position, the version counter, the evaluations so far and the tracker's run id. Rollout seeds are pure functions of
``seed`` and the step, and the learning rate of the step, so they need no state.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from framework.checkpoint import rng_state, set_rng_state
from framework.config import RunConfig, flatten, plain
from framework.data.order import ShuffledOrder
from framework.runtime import POLICY, Runtime, SamplingRuntime


@dataclass(slots=True, kw_only=True)
class Progress:
    """Mutable, one per run, the same on every rank."""

    order: ShuffledOrder
    step: int = 0
    """The last step that was finished."""
    evaluations: list[float] = field(default_factory=list)
    """What was measured before the first step, and since."""


class StopSignal:
    """Remembers SIGTERM, so that the run ends after the step it is in."""

    def __init__(self) -> None:
        self.received = False
        signal.signal(signal.SIGTERM, self._receive)

    def _receive(self, number: int, frame: Any) -> None:
        self.received = True


def begin(cfg: RunConfig, rt: Runtime, order: ShuffledOrder) -> Progress:
    """Makes the adapter, or takes up the checkpoint that the runtime found. All ranks must call it."""
    rt.trainer.add_adapter(POLICY, cfg.lora, seed=cfg.seed)
    if rt.resumed is None:
        return Progress(order=order)
    state, meta = rt.resumed.state, rt.resumed.meta
    prefix = "adapter."
    rt.trainer.load_state_dict(
        POLICY, {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    )
    order.load_state_dict(meta["order"])
    if isinstance(rt, SamplingRuntime):
        versions = rt.weight_sync.versions
        versions.last = max(versions.last, meta["last_version"])
    set_rng_state(state)
    return Progress(order=order, step=rt.resumed.step, evaluations=list(meta["evaluations"]))


def save(cfg: RunConfig, rt: Runtime, progress: Progress) -> None:
    """Writes a checkpoint of ``progress.step``. All ranks must call it."""
    state = {f"adapter.{key}": value for key, value in rt.trainer.state_dict(POLICY).items()}
    meta: Mapping[str, Any] = {
        "order": progress.order.state_dict(),
        "last_version": rt.weight_sync.versions.last if isinstance(rt, SamplingRuntime) else 0,
        "evaluations": progress.evaluations,
        "tracker": rt.tracker.run_id,
    }
    rt.store.save(progress.step, {**state, **rng_state()}, meta=meta, config=flatten(plain(cfg)))


def end_step(cfg: RunConfig, rt: Runtime, progress: Progress, stop: StopSignal) -> bool:
    """Checkpoints when it is time to. True if the run was told to stop and has been saved. All ranks must call it."""
    stopping = any(rt.mesh.all_gather(stop.received))
    due = cfg.checkpoint.every and progress.step % cfg.checkpoint.every == 0
    if stopping or due:
        save(cfg, rt, progress)
    if stopping and rt.mesh.rank == 0:
        print(
            f"stopped by SIGTERM after step {progress.step}; continue with +resume=auto run_dir={rt.run_dir}",
            flush=True,
        )
    return stopping
