"""What test_checkpoint.py shares, and the processes it kills: run as a program, this file saves and dies.

The killer forks a child per line of checkpoint.py and storage.py that a save or a clean-up executes, lets it die there,
and looks at what is on disk.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch
from torch import Tensor

from framework import checkpoint, storage
from framework.checkpoint import CheckpointStore
from framework.device import open_device
from framework.distributed import open_mesh
from tests.ranks import ROOT, clean_environment, free_port

T = TypeVar("T")

CONFIG = {"seed": 7, "lora.rank": 16, "num_steps": 40, "tracking.project": "p", "lora.targets": ["q_proj", "v_proj"]}


SCENARIOS = ("save", "save again", "clean up")


class OneRank:
    """A world of one."""

    rank = 0
    world_size = 1

    def all_gather(self, value: T) -> list[T]:
        return [value]


def state_of(step: int, rank: int = 0, size: int = 50) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return {"policy/master": torch.randn(size, generator=generator), "policy/step": torch.tensor(step)}


def open_store(folder: Path, keep: int = 2) -> CheckpointStore:
    return CheckpointStore(folder, keep=keep, ranks=OneRank())


def save(store: CheckpointStore, step: int, size: int = 50) -> Path:
    return store.save(step, state_of(step, size=size), meta={"data": {"epoch": step}}, config=CONFIG)


def check(store: CheckpointStore, path: Path, size: int = 50) -> int:
    """Loads a checkpoint, compares every byte with what was saved, returns its step."""
    loaded = store.load(path, config=CONFIG)
    expected = state_of(loaded.step, size=size)
    assert loaded.state.keys() == expected.keys()
    assert all(torch.equal(loaded.state[name], expected[name]) for name in expected)
    assert loaded.meta == {"data": {"epoch": loaded.step}}
    return loaded.step


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def exit_at_line(number: int) -> None:
    """Ends this process without any clean-up when the ``number``-th line of the two files is about to run."""
    files = {checkpoint.__file__, storage.__file__}
    count = 0

    def on_event(frame: FrameType, event: str, _: object) -> Any:
        nonlocal count
        if frame.f_code.co_filename not in files:
            return None
        if event == "line":
            count += 1
            if count == number:
                os._exit(9)
        return on_event

    sys.settrace(on_event)


def killed_at(number: int, work: Callable[[], object]) -> bool:
    """Runs ``work`` in a forked child that dies at line ``number``; False when the work ended before that."""
    child = os.fork()
    if child == 0:
        exit_at_line(number)
        work()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, 9), code
    return code == 9


def prepare(folder: Path, scenario: str) -> tuple[Callable[[], object], set[int]]:
    """Makes a folder with steps 1 and 2, and says what is to be killed and which steps may be the newest afterwards."""
    store = open_store(folder)
    save(store, 1)
    save(store, 2)
    if scenario == "save":
        return (lambda: save(open_store(folder), 3)), {2, 3}
    if scenario == "save again":
        return (lambda: save(open_store(folder), 2)), {2}
    # what a kill inside "save again" can leave, at its worst: both folders of the step under other names
    (folder / "step_000002").rename(folder / "step_000002.replaced-0123abcd")
    shutil.copytree(folder / "step_000001", folder / "step_000002.tmp-0123abcd")
    return (lambda: open_store(folder)), {2}


def kill_everywhere(root: Path, scenario: str) -> dict[str, Any]:
    os.fsync = lambda fd: None  # the death of a process loses nothing that was written; without it this is quicker
    folder, template, newest = root / "c", root / "template", list[int]()
    work, allowed = prepare(folder, scenario)
    folder.rename(template)
    died, number = True, 0
    while died:
        number += 1
        shutil.copytree(template, folder)
        died = killed_at(number, work)
        store = open_store(folder)  # the restart cleans up
        latest = store.latest()
        assert latest is not None, f"nothing left after a kill at line {number}"
        newest.append(check(store, latest))
        assert newest[-1] in allowed, f"step {newest[-1]} after a kill at line {number}"
        for path in folder.iterdir():
            check(store, path)  # nothing else, and nothing half-written, under any name
        assert check(store, save(store, 3)) == 3
        shutil.rmtree(folder)
    return {"points": number - 1, "newest": sorted(set(newest))}


def kill_while_writing(folder: Path) -> int:
    """Kills a child in the middle of saving 16 MB, a little later each time; how often a part was left behind."""
    size, unfinished = 4_000_000, 0
    save(open_store(folder), 1, size=size)
    for trial in range(10):
        child = os.fork()
        if child == 0:
            save(open_store(folder), trial + 2, size=size)
            os._exit(0)
        final = folder / f"step_{trial + 2:06d}"
        while not final.exists() and not any(folder.glob("step_*.tmp-*/rank_*")):
            time.sleep(0.0002)  # the kill has to hit the write, whatever else the machine does
        time.sleep(0.003 * trial)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        unfinished += any(".tmp-" in name for name in names(folder))
        store = open_store(folder)
        latest = store.latest()
        assert latest is not None
        assert check(store, latest, size=size) in range(1, trial + 3)
    return unfinished


def two_ranks(folder: Path, what: str) -> None:
    """One of two ranks: ``first life`` saves three times and rank 1 dies in the fourth; ``second life`` resumes."""
    mesh = open_mesh(open_device("cpu", local_rank=0), tensor_parallel_size=2, timeout_s=60)
    store = CheckpointStore(folder, keep=2, ranks=mesh)
    latest = store.latest()
    if what == "first life":
        assert latest is None
    else:
        assert latest is not None
        loaded = store.load(latest, config=CONFIG)
        mine = state_of(loaded.step, mesh.rank)
        assert loaded.step == 3
        assert all(torch.equal(loaded.state[name], mine[name]) for name in mine)
    for step in (1, 2, 3, 4) if latest is None else (4,):
        if what == "first life" and step == 4 and mesh.rank == 1:
            exit_at_line(15)
        store.save(step, state_of(step, mesh.rank), meta={}, config=CONFIG)
    mesh.barrier()


def start(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    """This file as a program."""
    return subprocess.Popen(
        [sys.executable, __file__, *arguments],
        env={**clean_environment(), **environment},
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def run_kills(folder: Path) -> dict[str, Any]:
    """Every kill there is, in one process of its own, as it forks; what it found."""
    process = start("kills", str(folder))
    output, errors = process.communicate(timeout=500)
    assert process.returncode == 0, errors
    return json.loads(output)  # type: ignore[no-any-return]


def run_two_ranks(folder: Path, what: str) -> list[int]:
    """:func:`two_ranks` in two processes over gloo; their exit codes."""
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = [start(what, str(folder), RANK=str(rank), LOCAL_RANK=str(rank), **common) for rank in range(2)]
    outputs = [process.communicate(timeout=200) for process in processes]
    print(*(errors for _, errors in outputs), sep="\n")  # pytest shows it when the test fails
    return [process.returncode for process in processes]


def main() -> None:
    """The processes that the tests start."""
    what, folder = sys.argv[1], Path(sys.argv[2])
    if what == "kills":
        found: dict[str, Any] = {scenario: kill_everywhere(folder / scenario, scenario) for scenario in SCENARIOS}
        print(json.dumps({**found, "left unfinished": kill_while_writing(folder / "writing")}))
    else:
        two_ranks(folder, what)


if __name__ == "__main__":
    main()
