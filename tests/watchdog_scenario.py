"""What test_watchdog.py runs on two ranks: one sleeps while the other waits for it in a collective."""

from __future__ import annotations

import time
from pathlib import Path

from framework.device import open_device
from framework.distributed import open_mesh


def one_rank_sleeps(run_dir: Path, limit_s: float, sleeper: int) -> str:
    """Never returns: the watchdog ends both ranks."""
    mesh = open_mesh(open_device("cpu", local_rank=0), tensor_parallel_size=2, timeout_s=limit_s)
    mesh.watchdog.folder = run_dir
    mesh.all_gather("both are here")
    (run_dir / f"started{mesh.rank}").write_text(str(time.time()))
    if mesh.rank == sleeper:
        fetch_something_for_ever()
    mesh.all_gather("only one gets here")
    return "not reached"


def fetch_something_for_ever() -> None:
    """The name that the dump must show."""
    time.sleep(300)


def patient(run_dir: Path) -> str:
    """Signs of life keep a long call alive: three times the limit in all, never the limit at once."""
    mesh = open_mesh(open_device("cpu", local_rank=0), tensor_parallel_size=2, timeout_s=2.0)
    mesh.watchdog.folder = run_dir
    with mesh.watchdog.watch("a long phase"):
        for _ in range(6):
            time.sleep(1.0)
            mesh.barrier()
    time.sleep(2.5)  # outside a watched call nothing is late
    return "done"
