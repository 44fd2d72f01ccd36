"""What a run carries from step to step, how it is saved and taken up again, and what it leaves at its end.

A checkpoint holds the masters of the adapter (in full fine-tuning, of the model), Adam moments, step and dropout
counters, every rank's random states, the data position, the version counter, the evaluations so far and the tracker's
run id. Rollout seeds are pure functions of ``seed`` and the step, and the learning rate of the step, so they need no
state.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from framework.checkpoint import rng_state, set_rng_state
from framework.config import RunConfig, flatten, plain
from framework.data.order import ShuffledOrder
from framework.errors import AdapterError
from framework.lora.peft_io import load_peft, save_peft
from framework.lora.spec import LoraSpec
from framework.models.export import save_model
from framework.runtime import POLICY, Runtime, SamplingRuntime, versions


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
    """Makes what is trained, or takes up the checkpoint that the runtime found. All ranks must call it."""
    if cfg.lora is None:
        rt.trainer.train_base(POLICY)
    else:
        rt.trainer.add_adapter(POLICY, cfg.lora, seed=cfg.seed)
    if rt.resumed is None:
        if cfg.lora is not None and cfg.init_adapter is not None:
            with rt.mesh.agree_on_error("reading the adapter"):
                tensors = read_initial(Path(cfg.init_adapter), cfg.lora)
            rt.trainer.import_adapter(POLICY, tensors)
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


def read_initial(folder: Path, spec: LoraSpec) -> Mapping[str, npt.NDArray[np.float32]]:
    """The factors of a PEFT folder.

    Raises:
        AdapterError: the folder cannot be read, or its adapter is of another shape; the keys to change are named.
    """
    found, tensors = load_peft(folder)
    differing = {
        key: (getattr(found, key), getattr(spec, key))
        for key in ("rank", "alpha", "targets", "use_rslora")
        if getattr(found, key) != getattr(spec, key)
    }
    if differing:
        lines = ", ".join(f"lora.{key}={theirs!r} (here {ours!r})" for key, (theirs, ours) in differing.items())
        raise AdapterError(f"init_adapter={folder}: this adapter needs {lines}")
    return tensors


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


def finish(cfg: RunConfig, rt: Runtime, summary: Mapping[str, Any]) -> None:
    """Writes the adapter as a PEFT folder, or the model as a Hugging Face one, and ``summary.json``. Collective.

    Args:
        summary: what the recipe measured; what every recipe's summary has is added.
    """
    result = _export_model(rt) if cfg.lora is None else _export_adapter(cfg, rt, cfg.lora)
    rt.tracker.finish(
        {
            **summary,
            "num_steps": cfg.num_steps,
            "model": cfg.model.name_or_path,
            "model_source": rt.base.model.source,
            "versions": versions(),
            **result,
        }
    )


def _export_adapter(cfg: RunConfig, rt: Runtime, spec: LoraSpec) -> dict[str, str]:
    """``{"adapter": its folder}``."""
    tensors = rt.trainer.export_adapter(POLICY)
    folder = rt.run_dir / "adapter"
    with rt.mesh.agree_on_error("writing the adapter"):
        if rt.mesh.rank == 0:
            save_peft(folder, spec=spec, tensors=tensors, base_model=cfg.model.name_or_path, dtype=rt.base.dtype)
    return {"adapter": str(folder)}


def _export_model(rt: Runtime) -> dict[str, str]:
    """``{"trained_model": its folder}``."""
    tensors = rt.trainer.export_base(POLICY)
    folder = rt.run_dir / "model"
    with rt.mesh.agree_on_error("writing the model"):
        if rt.mesh.rank == 0:
            save_model(folder, base=rt.base.model.path, tensors=tensors)
    return {"trained_model": str(folder)}


def steady_mean(history: Sequence[Mapping[str, float]], *names: str) -> float:
    """The mean over steps of the sum of these metrics, without the first step, which warms up; 0 without steps."""
    steady = history[1:] or history
    return sum(metrics.get(name, 0.0) for metrics in steady for name in names) / max(1, len(steady))
