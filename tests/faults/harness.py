"""Runs cases of the table with torchrun's own agent and writes what came of each; a process of its own.

Everything is imported once, in a fork server; ranks are forked from it, so a case takes a few seconds.
``python -m tests.faults.harness <folder> <case> ...`` leaves ``<folder>/<case>.json``, and ``whole.json`` of the run
that nothing happened to.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import shutil
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from tests.faults.cases import CASES, Case
from tests.faults.toy_run import on_rank

NUM_RANKS = 2
LIMIT_S = 100
DIES_AT_5 = {"action": "kill", "phase": "generate", "rank": 1, "step": 5}


def start(
    logs: Path, run_dir: Path, fault: Mapping[str, Any] | None, *, timeout_s: float = 60.0, restarts: int = 0
) -> dict[str, Any]:
    """One ``torchrun --nproc_per_node=2 --max-restarts=...``: exit code, output by attempt, seconds."""
    began = time.monotonic()
    logs.mkdir(parents=True)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=NUM_RANKS,
        run_id="faults",
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=restarts,
        start_method="forkserver",
        shutdown_timeout=5,
        logs_specs=DefaultLogsSpecs(log_dir=str(logs), redirects=Std.ALL),
    )
    code, agent = 0, ""
    signal.alarm(LIMIT_S)
    try:
        elastic_launch(config, on_rank)(str(run_dir), fault, timeout_s)
    except ChildFailedError as error:
        code, agent = 1, str(error)
    except TimeoutError:
        code, agent = -1, f"took longer than {LIMIT_S} s"
    finally:
        signal.alarm(0)
    attempts = sorted(logs.glob("*/attempt_*"))
    said = ["\n".join(file.read_text(errors="replace") for file in sorted(a.glob("*/std*.log"))) for a in attempts]
    return {"code": code, "said": said, "agent": agent, "seconds": time.monotonic() - began}


def _too_late(number: int, frame: FrameType | None) -> None:
    raise TimeoutError


def outcome(run_dir: Path) -> dict[str, Any]:
    """Steps without times and version (every push has a new one), the adapter, the checkpoints."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    adapter = run_dir / "adapter" / "adapter_model.safetensors"
    return {
        "steps": {
            row["step"]: {
                k: v for k, v in row.items() if not k.startswith("time/") and k not in ("timestamp", "sync/version")
            }
            for row in rows
            if "loss/total" in row
        },
        "adapter": hashlib.sha256(adapter.read_bytes()).hexdigest() if adapter.exists() else None,
        "checkpoints": sorted(p.name for p in (run_dir / "checkpoints").iterdir()),
        "stacks": {p.name: p.read_text() for p in run_dir.glob("stacks_rank*.txt")},
    }


def run_case(case: Case, folder: Path, killed: Path) -> dict[str, Any]:
    """All starts of one case."""
    run_dir, logs = folder / "run", folder / "logs"
    if case.how == "restarts":
        starts = [start(logs / "0", run_dir, case.fault, timeout_s=case.timeout_s, restarts=1)]
    elif case.how == "stops":
        starts = [start(logs / "0", run_dir, case.fault), start(logs / "1", run_dir, None)]
    else:
        shutil.copytree(killed, run_dir)
        newest = run_dir / "checkpoints" / "step_000004"
        assert case.damage is not None
        _damage(newest, case.damage)
        starts = [start(logs / "0", run_dir, None)]
        shutil.rmtree(newest)
        starts.append(start(logs / "1", run_dir, None))
    return {"starts": starts, **outcome(run_dir)}


def _damage(checkpoint: Path, what: str) -> None:
    path = checkpoint / what.removeprefix("-")
    if what.startswith("-"):
        path.unlink()
        return
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def main(folder: Path, names: list[str]) -> None:
    """The whole run and the killed run first, then the cases."""
    multiprocessing.set_forkserver_preload(["tests.faults.toy_run", "peft"])
    signal.signal(signal.SIGALRM, _too_late)
    whole, killed = folder / "whole", folder / "killed"
    result = start(folder / "whole-logs", whole, None)
    (folder / "whole.json").write_text(json.dumps({"starts": [result], **outcome(whole)}))
    start(folder / "killed-logs", killed, DIES_AT_5)
    for name in names:
        result = run_case(CASES[name], folder / name, killed)
        (folder / f"{name}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
