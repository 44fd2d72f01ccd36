"""What test_resume.py runs on ranks: a run whole, a run that dies after a checkpoint, and its continuation."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

from framework import progress
from framework.config import RunConfig
from framework.errors import CheckpointError
from framework.runtime import SamplingRuntime, open_sampling, open_training
from recipes import grpo, sft
from tests.recipes.scenario import config

NOT_OF_THE_RUN = ("timestamp", "step", "sync/version")


def run_once(recipe: str, model: Path, run_dir: Path, kill_after: int | None, **overrides: Any) -> str:
    """Runs the recipe in this process group. ``kill_after`` ends the process without warning after that step."""
    cfg = config(model, run_dir, **overrides)
    if kill_after is not None:
        _die_after(kill_after)
    try:
        if recipe == "grpo":
            grpo.run(cfg, open_sampling(cfg))
        else:
            sft.run(cfg, open_training(cfg))
    except CheckpointError as error:
        return str(error)
    return "finished"


def _die_after(step: int) -> None:
    """SIGKILL to this rank at the end of ``step``, after what end_step writes: the step after it never happens."""
    original = progress.end_step

    def end_step(cfg: RunConfig, rt: SamplingRuntime, state: progress.Progress, stop: progress.StopSignal) -> bool:
        stopping = original(cfg, rt, state, stop)
        if state.step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return stopping

    grpo.end_step = end_step  # type: ignore[assignment]
    sft.end_step = end_step  # type: ignore[assignment]


def steps_of(run_dir: Path) -> dict[int, dict[str, Any]]:
    """Every step's metrics without what is a matter of the clock, and without the version: every push has a new one."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {
        row["step"]: {k: v for k, v in row.items() if not k.startswith("time/") and k not in NOT_OF_THE_RUN}
        for row in rows
        if "loss/total" in row
    }
