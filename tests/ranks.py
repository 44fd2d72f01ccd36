"""Runs a function on every rank of a real ``torchrun`` (gloo, CPU) and brings back what each rank returned.

A test calls :func:`run_ranks`; in the children this same file is the program. Launching costs seconds, so a test
module runs many checks in one launch and asserts on the numbers that come back.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import psutil
import torch

from framework.distributed import close_mesh

ROOT = Path(__file__).parents[1]


class RanksFailed(AssertionError):
    """The launch failed or took too long; the message has the end of the output and every rank's traceback."""


def free_port() -> int:
    """A port of this machine that nobody listens on, below those the system gives to outgoing connections.

    A service binds it seconds later; until then a rank's connections must not be given it.
    """
    while True:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", random.SystemRandom().randrange(20_000, 32_000)))
            return int(probe.getsockname()[1])


def clean_environment() -> dict[str, str]:
    """This process's environment without what a process group of its own may have set; one thread per rank."""
    torchrun = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {key: value for key, value in os.environ.items() if key not in torchrun}
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "PYTHONWARNINGS": "ignore"}


def run_ranks(target: str, folder: Path, *, nproc: int = 2, timeout_s: float = 120.0, **arguments: Any) -> list[Any]:
    """Calls ``module:function`` with ``arguments`` on every rank.

    Args:
        target: e.g. ``"tests.trainer.megatron.scenario:on_two_ranks"``.
        folder: an empty folder for what the ranks leave behind.
        nproc: number of ranks.
        timeout_s: after it every process of the launch is killed.
        arguments: anything ``torch.save`` can write.

    Returns:
        What the function returned, by rank.

    Raises:
        RanksFailed: a rank raised or left no result, or the time was up.
    """
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(arguments, folder / "arguments.pt")
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={nproc}"]
    command += ["--master_addr=127.0.0.1", f"--master_port={free_port()}", str(Path(__file__)), target, str(folder)]
    code = run_bounded(command, folder / "output.txt", timeout_s=timeout_s)
    results = [folder / f"rank{rank}.pt" for rank in range(nproc)]
    if code != 0 or not all(path.exists() for path in results):
        ending = "took longer than " + f"{timeout_s:.0f} s" if code is None else f"exit code {code}"
        raise RanksFailed(f"{target} on {nproc} ranks: {ending}\n{_evidence(folder, nproc)}")
    return [torch.load(path, weights_only=False) for path in results]


def run_bounded(command: list[str], output: Path, *, timeout_s: float) -> int | None:
    """The command's exit code with its output in a file, or None when it had to be killed with all it started."""
    with output.open("wb") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=clean_environment(), stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            return process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None
        finally:
            _kill_tree(process)


def _kill_tree(process: subprocess.Popen[bytes]) -> None:
    """Kills the process and its descendants, which torchrun gives sessions of their own."""
    if process.poll() is None:
        victims = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)  # torchrun stops its workers on it
        deadline = time.monotonic() + 3.0
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.kill()
        process.wait()
        for victim in victims:
            if victim.is_running():
                victim.kill()


def _evidence(folder: Path, nproc: int) -> str:
    lines = []
    for rank in range(nproc):
        error = folder / f"rank{rank}.error"
        if error.exists():
            lines.append(f"--- rank {rank}\n{error.read_text()}")
    output = folder / "output.txt"
    lines.append("--- end of the output\n" + "\n".join(output.read_text(errors="replace").splitlines()[-40:]))
    return "\n".join(lines)


def _child(target: str, folder: Path) -> None:
    rank = int(os.environ["RANK"])
    module, _, function = target.partition(":")
    try:
        torch.set_num_threads(1)
        result = getattr(importlib.import_module(module), function)(
            **torch.load(folder / "arguments.pt", weights_only=False)
        )
        temporary = folder / f"rank{rank}.partial"
        torch.save(result, temporary)
        temporary.rename(folder / f"rank{rank}.pt")
        close_mesh()
    except BaseException:
        (folder / f"rank{rank}.error").write_text(traceback.format_exc())
        raise


if __name__ == "__main__":
    _child(sys.argv[1], Path(sys.argv[2]))
