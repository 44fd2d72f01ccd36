"""Checkpoints survive kills, full disks and damage; every refusal names its file or key."""

from __future__ import annotations

import errno
import random
import resource
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from torch import Tensor

from framework.checkpoint import CheckpointStore, rng_state, set_rng_state
from framework.errors import CheckpointError, ConfigError, StorageError
from tests.checkpoint_scenario import CONFIG, check, names, open_store, run_kills, run_two_ranks, save, state_of

T = TypeVar("T")


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


@pytest.fixture(scope="module")
def kills(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_kills(tmp_path_factory.mktemp("kills"))


@pytest.mark.parametrize(
    ("scenario", "newest", "points"), [("save", [2, 3], 100), ("save again", [2], 100), ("clean up", [2], 12)]
)
def test_a_kill_at_any_line_leaves_the_last_good_checkpoint(
    kills: dict[str, Any], scenario: str, newest: list[int], points: int
) -> None:
    assert kills[scenario]["newest"] == newest
    assert kills[scenario]["points"] >= points


def test_a_kill_while_bytes_are_written_leaves_the_last_good_checkpoint(kills: dict[str, Any]) -> None:
    assert kills["left unfinished"] > 0, "no kill hit a checkpoint that was being written"


def test_two_processes_write_one_checkpoint_and_a_dead_rank_spoils_none(tmp_path: Path) -> None:
    codes = run_two_ranks(tmp_path, "first life")
    assert codes[1] == 9
    assert codes[0] not in (0, 9)
    assert [name for name in names(tmp_path) if ".tmp-" not in name] == ["step_000002", "step_000003"]
    assert run_two_ranks(tmp_path, "second life") == [0, 0]
    assert names(tmp_path) == ["step_000003", "step_000004"]
