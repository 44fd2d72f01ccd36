"""Checkpoints survive kills, full disks and damage. Run as a script, this file is the process that gets killed."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from torch import Tensor

from framework import checkpoint, storage
from framework.checkpoint import CheckpointStore, rng_state, set_rng_state
from framework.errors import CheckpointError, ConfigError, StorageError

T = TypeVar("T")

CONFIG = {"seed": 7, "lora.rank": 16, "num_steps": 40, "tracking.project": "p", "lora.targets": ["q_proj", "v_proj"]}


class OneRank:
    """A world of one."""

    rank = 0
    world_size = 1

    def all_gather(self, value: T) -> list[T]:
        return [value]


class ThreadRank:
    """One rank of a world of threads that meet at a barrier."""

    def __init__(self, rank: int, world_size: int, board: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.world_size = rank, world_size
        self._board, self._barrier = board, barrier

    def all_gather(self, value: T) -> list[T]:
        self._board[self.rank] = value
        self._barrier.wait(timeout=20)
        values = list(self._board)
        self._barrier.wait(timeout=20)
        return values


def on_ranks(world_size: int, work: Callable[[ThreadRank], T]) -> list[T | Exception]:
    """What ``work`` returned or raised on each rank."""
    board: list[Any] = [None] * world_size
    barrier = threading.Barrier(world_size)
    outcomes: list[Any] = [None] * world_size

    def run(rank: int) -> None:
        try:
            outcomes[rank] = work(ThreadRank(rank, world_size, board, barrier))
        except Exception as error:  # noqa: BLE001 - the outcome
            outcomes[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


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


def test_what_is_saved_is_loaded_bit_for_bit_and_the_newest_are_kept(tmp_path: Path) -> None:
    store = open_store(tmp_path / "c", keep=2)
    assert store.latest() is None
    for step in (3, 10, 999_999, 1_000_000):
        assert check(store, save(store, step)) == step
    assert names(tmp_path / "c") == ["step_1000000", "step_999999"]
    again = open_store(tmp_path / "c")
    latest = again.latest()
    assert latest == tmp_path / "c" / "step_1000000"
    assert check(again, latest) == 1_000_000


def test_all_dtypes_and_shapes_survive(tmp_path: Path) -> None:
    state = {
        "a": torch.randn(3, 4).T,
        "b": torch.randn(5).bfloat16(),
        "c": torch.tensor(3),
        "d": torch.zeros(0),
        "e": torch.tensor([True, False]),
        "f": torch.tensor([float("nan"), float("inf"), -0.0]),
    }
    store = open_store(tmp_path)
    loaded = store.load(store.save(1, state, meta={}, config={}), config={}).state
    for name, tensor in state.items():
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].shape == tensor.shape
        assert (
            loaded[name]
            .view(torch.uint8 if tensor.ndim else tensor.dtype)
            .equal(tensor.contiguous().view(torch.uint8 if tensor.ndim else tensor.dtype))
        )


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.save(1, {"a": torch.zeros(3)}, meta={}, config=CONFIG)
    assert check(store, save(store, 1)) == 1
    assert names(tmp_path) == ["step_000001"]


def test_a_run_that_went_back_does_not_resume_from_the_future_it_left(tmp_path: Path) -> None:
    store = open_store(tmp_path, keep=2)
    for step in (10, 20, 30):
        save(store, step)
    save(store, 15)
    assert [name[:19] for name in names(tmp_path)] == ["step_000015", "step_000020.rewound", "step_000030.rewound"]
    assert store.latest() == tmp_path / "step_000015"
    assert open_store(tmp_path).latest() == tmp_path / "step_000015"


def test_keep_must_be_positive(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"checkpoint\.keep=0"):
        open_store(tmp_path, keep=0)


def test_every_damaged_byte_is_noticed_and_its_file_named(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    path = save(store, 1)
    for file in sorted(path.iterdir()):
        good = file.read_bytes()
        for position in range(len(good)):
            file.write_bytes(good[:position] + bytes([good[position] ^ 0x20]) + good[position + 1 :])
            with pytest.raises(CheckpointError) as caught:
                store.load(path, config=CONFIG)
            assert "step_000001" in str(caught.value)
            if file.name != "MANIFEST.json":
                assert f"{file} is damaged" in str(caught.value)
        file.write_bytes(good)
    assert check(store, path) == 1


def test_missing_and_cut_files_are_named(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    path = save(store, 1)
    for file in sorted(path.iterdir()):
        good = file.read_bytes()
        file.write_bytes(good[:-1])
        with pytest.raises(CheckpointError, match=file.name):
            store.load(path, config=CONFIG)
        file.unlink()
        with pytest.raises(CheckpointError, match=rf"{file.name} is missing.*remove .*step_000001"):
            store.load(path, config=CONFIG)
        file.write_bytes(good)
    with pytest.raises(CheckpointError, match=r"step_000009.MANIFEST\.json is missing"):
        store.load(tmp_path / "step_000009", config=CONFIG)


def test_another_configuration_is_refused_with_each_key_and_both_values(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    path = save(store, 1)
    other: dict[str, Any] = {**CONFIG, "lora.rank": 8, "lora.targets": ["q_proj"], "new.key": None}
    del other["seed"]
    with pytest.raises(CheckpointError) as caught:
        store.load(path, config=other)
    assert str(caught.value).splitlines() == [
        f"{path} is of another configuration:",
        "  lora.rank: the checkpoint has 16, this run 8",
        '  lora.targets: the checkpoint has ["q_proj", "v_proj"], this run ["q_proj"]',
        "  new.key: the checkpoint has no such key, this run null",
        "  seed: the checkpoint has 7, this run no such key",
        "set these keys back, or start a new run_dir",
    ]
    free = {**CONFIG, "num_steps": 80, "tracking.project": "q", "run_dir": "/elsewhere", "checkpoint.keep": 9}
    assert store.load(path, config=free).step == 1


@pytest.mark.parametrize(("room", "padding"), [(10, 0), (300, 0), (1000, 2000)])
def test_a_full_disk_leaves_the_last_good_checkpoint_and_no_rest(tmp_path: Path, room: int, padding: int) -> None:
    store = open_store(tmp_path)
    save(store, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))  # writes beyond it fail, as on a full disk
    try:
        with pytest.raises(StorageError, match=r"step_000002.*GiB free there\); free some space or change run_dir"):
            store.save(2, state_of(2), meta={"padding": "x" * padding}, config=CONFIG)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert names(tmp_path) == ["step_000001"]
    assert check(store, tmp_path / "step_000001") == 1


def test_a_folder_that_cannot_be_made_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="run_dir"):
        open_store(tmp_path / "file" / "c")


def test_every_rank_gets_its_own_state_and_the_same_meta(tmp_path: Path) -> None:
    def work(ranks: ThreadRank) -> tuple[Path | None, bool, Any]:
        store = CheckpointStore(tmp_path, keep=1, ranks=ranks)
        for step in (1, 2):
            store.save(step, state_of(step, ranks.rank), meta={"told by": ranks.rank}, config=CONFIG)
        latest = store.latest()
        assert latest is not None
        loaded = store.load(latest, config=CONFIG)
        mine = state_of(2, ranks.rank)
        return latest, all(torch.equal(loaded.state[name], mine[name]) for name in mine), loaded.meta

    assert on_ranks(3, work) == [(tmp_path / "step_000002", True, {"told by": 0})] * 3
    assert names(tmp_path) == ["step_000002"]
    with pytest.raises(CheckpointError, match="written by 3 ranks, this run has 1"):
        open_store(tmp_path).load(tmp_path / "step_000002", config=CONFIG)


class UnwritableState(dict[str, Tensor]):
    """Behaves as a state on a disk that is full."""

    def items(self) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_one_ranks_failure_to_write_is_every_ranks_and_nothing_is_left(tmp_path: Path) -> None:
    def work(ranks: ThreadRank) -> None:
        store = CheckpointStore(tmp_path, keep=1, ranks=ranks)
        store.save(1, state_of(1, ranks.rank), meta={}, config=CONFIG)
        store.save(2, UnwritableState() if ranks.rank == 1 else state_of(2), meta={}, config=CONFIG)

    outcomes = on_ranks(3, work)
    assert all(isinstance(outcome, StorageError) for outcome in outcomes)
    assert ["on rank 1: could not write" in str(outcome) for outcome in outcomes] == [True, False, True]
    assert names(tmp_path) == ["step_000001"]


def test_one_ranks_damaged_file_is_every_ranks_error(tmp_path: Path) -> None:
    def saving(ranks: ThreadRank) -> None:
        store = CheckpointStore(tmp_path, keep=1, ranks=ranks)
        store.save(1, state_of(1, ranks.rank), meta={}, config=CONFIG)

    def loading(ranks: ThreadRank) -> None:
        CheckpointStore(tmp_path, keep=1, ranks=ranks).load(tmp_path / "step_000001", config=CONFIG)

    assert on_ranks(2, saving) == [None, None]
    file = tmp_path / "step_000001" / "rank_00001.safetensors"
    good = file.read_bytes()
    file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    outcomes = on_ranks(2, loading)
    assert all(isinstance(outcome, CheckpointError) for outcome in outcomes)
    assert all("rank_00001.safetensors is damaged" in str(outcome) for outcome in outcomes)


def test_random_states_go_on_where_they_were() -> None:
    def draw() -> list[float]:
        return [random.gauss(0, 1), random.random(), np.random.normal(), np.random.rand(), torch.randn(1).item()]

    random.gauss(0, 1)  # leaves the second of a pair behind, in numpy too
    np.random.normal()
    saved = rng_state()
    expected = [draw() for _ in range(3)]
    assert [draw() for _ in range(3)] != expected
    set_rng_state({**saved, "policy/master": torch.zeros(1)})
    assert [draw() for _ in range(3)] == expected
    with pytest.raises(CheckpointError, match=r"rng\.torch"):
        set_rng_state({name: value for name, value in saved.items() if name != "rng.torch"})


# Kills. The process below forks a child per line of checkpoint.py and storage.py that a save (or a clean-up)
# executes and lets it die there; then it looks at what is on disk.


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


@pytest.mark.parametrize(("scenario", "newest"), [("save", [2, 3]), ("save again", [2]), ("clean up", [2])])
def test_a_kill_at_any_line_leaves_the_last_good_checkpoint(tmp_path: Path, scenario: str, newest: list[int]) -> None:
    output = run_script("kill_everywhere", str(tmp_path), scenario)
    report = json.loads(output)
    assert report["newest"] == newest
    assert report["points"] >= {"save": 100, "save again": 100, "clean up": 12}[scenario]


def test_a_kill_while_bytes_are_written_leaves_the_last_good_checkpoint(tmp_path: Path) -> None:
    assert int(run_script("kill_while_writing", str(tmp_path))) > 0, "no kill hit a checkpoint that was being written"


def kill_while_writing(folder: Path) -> int:
    """Kills a child in the middle of saving 16 MB, a little later each time; how often a part was left behind."""
    size, unfinished = 4_000_000, 0
    save(open_store(folder), 1, size=size)
    for trial in range(10):
        child = os.fork()
        if child == 0:
            save(open_store(folder), trial + 2, size=size)
            os._exit(0)
        time.sleep(0.02 * (trial + 1))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        unfinished += any(".tmp-" in name for name in names(folder))
        store = open_store(folder)
        latest = store.latest()
        assert latest is not None
        assert check(store, latest, size=size) in range(1, trial + 3)
    return unfinished


def test_two_processes_write_one_checkpoint_and_a_dead_rank_spoils_none(tmp_path: Path) -> None:
    assert two_processes("two_ranks", str(tmp_path), "all live") == [0, 0]
    assert names(tmp_path) == ["step_000002", "step_000003"]
    codes = two_processes("two_ranks", str(tmp_path), "rank 1 dies")
    assert codes[1] == 9
    assert codes[0] not in (0, 9)
    assert two_processes("two_ranks", str(tmp_path), "resume") == [0, 0]


def two_ranks(folder: Path, what: str) -> None:
    """One of two real ranks over gloo, in the life of a run: three saves; a death in the fourth; a resume."""
    from framework.device import open_device
    from framework.distributed import open_mesh

    mesh = open_mesh(open_device("cpu", local_rank=0), tensor_parallel_size=2, timeout_s=30)
    store = CheckpointStore(folder, keep=2, ranks=mesh)
    latest = store.latest()
    if latest is not None:
        loaded = store.load(latest, config=CONFIG)
        mine = state_of(loaded.step, mesh.rank)
        assert loaded.step == 3
        assert all(torch.equal(loaded.state[name], mine[name]) for name in mine)
    for step in {"all live": (1, 2, 3), "rank 1 dies": (4,), "resume": (4,)}[what]:
        if what == "rank 1 dies" and mesh.rank == 1:
            exit_at_line(15)
        store.save(step, state_of(step, mesh.rank), meta={}, config=CONFIG)
    mesh.barrier()


def script(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    root = str(Path(__file__).parents[1])
    variables = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, __file__, *arguments]
    return subprocess.Popen(command, env=variables, cwd=root, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def run_script(*arguments: str) -> str:
    process = script(*arguments)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return output


def two_processes(*arguments: str) -> list[int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [script(*arguments, RANK=str(rank), LOCAL_RANK=str(rank), **common) for rank in range(2)]
    outputs = [process.communicate(timeout=120) for process in processes]
    print(*(errors for _, errors in outputs), sep="\n")  # pytest shows it when the test fails
    return [process.returncode for process in processes]


def main() -> None:
    """The processes that the tests start."""
    what, folder, *rest = sys.argv[1:]
    if what == "kill_everywhere":
        print(json.dumps(kill_everywhere(Path(folder), rest[0])))
    elif what == "kill_while_writing":
        print(kill_while_writing(Path(folder)))
    else:
        two_ranks(Path(folder), rest[0])


if __name__ == "__main__":
    main()
