"""Mesh: who this rank is, and the host-side conversations of a lockstep group.

Ranks are laid out ``rank = dp_rank * tp_size + tp_rank``. Everything that can differ between ranks happens on
tensor-parallel rank 0 (the leader) and is broadcast over the host-side (control) group.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from framework.device import HOST, Device
from framework.errors import ConfigError, FrameworkError, LockstepError
from framework.watchdog import BACKSTOP_S, Watchdog

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Mesh:
    """The tensor-parallel group and the data-parallel group of this rank."""

    rank: int
    world_size: int
    tp_rank: int
    tp_size: int
    dp_rank: int
    dp_size: int
    tp_group: dist.ProcessGroup
    """Ranks that hold the shards of one model."""
    dp_group: dist.ProcessGroup
    """Ranks that hold the same shard and train on different data."""
    watchdog: Watchdog
    """Ends the run when a watched call is late; backends watch what contains collectives of their own."""

    @property
    def is_leader(self) -> bool:
        """True on the rank of its tensor-parallel group where environments, rewards and HTTP run."""
        return self.tp_rank == 0

    def broadcast(self, value: T | None) -> T:
        """The leader's value on every rank of the tensor-parallel group. All of them must call it."""
        if self.tp_size == 1:
            return value  # type: ignore[return-value]
        box = [value if self.is_leader else None]
        source = self.dp_rank * self.tp_size
        with self.watchdog.watch("broadcast"):
            dist.broadcast_object_list(box, src=source, group=self.tp_group, device=HOST)
        return box[0]  # type: ignore[return-value]

    def run_on_leader(self, work: Callable[[], T]) -> T:
        """Runs ``work`` on the leader and gives its result, or raises its error, on every rank of the group."""
        if self.tp_size == 1:
            return work()
        payload, failure = b"", None
        if self.is_leader:
            try:
                payload = pickle.dumps((work(), None))
            except Exception as error:  # noqa: BLE001 - carried to the other ranks and raised on all of them
                failure = _portable(error)
                payload = pickle.dumps((None, failure))
        value, carried = pickle.loads(self.broadcast(payload))
        if carried is not None:
            raise failure or carried  # the leader's own has its traceback
        return value  # type: ignore[no-any-return]

    def global_sum(self, values: list[float]) -> list[float]:
        """Adds numbers over the data-parallel group. All its ranks must call it."""
        if self.dp_size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        with self.watchdog.watch("global_sum"):
            dist.all_reduce(tensor, group=self.dp_group)
        return tensor.tolist()

    def all_gather(self, value: T) -> list[T]:
        """Every rank's value, in rank order, on every rank. All ranks of the world must call it."""
        if self.world_size == 1:
            return [value]
        box: list[Any] = [None] * self.world_size
        with self.watchdog.watch("all_gather"):
            dist.all_gather_object(box, value)
        return box

    def barrier(self) -> None:
        """Waits for all ranks of the world."""
        if self.world_size > 1:
            self.all_gather(None)

    @contextmanager
    def agree_on_error(self, what: str) -> Iterator[None]:
        """Lets no rank go on when the block failed on another: all ranks of the world raise.

        A rank that failed raises its own error; the others raise :class:`FrameworkError` with that rank's message.
        The block must not end in a collective that a failed rank would have missed.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as caught:  # noqa: BLE001 - raised again below, after the others know
            error = caught
        messages = self.all_gather(f"{type(error).__name__}: {error}" if error else None)
        if error is not None:
            raise error
        failed = {rank: message for rank, message in enumerate(messages) if message}
        if failed:
            rank, message = next(iter(failed.items()))
            raise FrameworkError(f"{what} failed on rank {rank}: {message}")

    def check_lockstep(self, what: str, value: object) -> None:
        """Compares ``value`` over the tensor-parallel group. All its ranks must call it.

        Args:
            what: names the call about to be made, for the message.
            value: anything whose ``repr`` is the same exactly when the ranks agree.

        Raises:
            LockstepError: on every rank, with every rank's value, when they differ.
        """
        if self.tp_size == 1:
            return
        digest = int.from_bytes(hashlib.blake2b(repr(value).encode(), digest_size=8).digest(), "big") >> 1
        extremes = torch.tensor([digest, -digest], dtype=torch.int64)
        with self.watchdog.watch(f"the comparison before {what}"):
            dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=self.tp_group)
        if extremes[0].item() == -extremes[1].item():
            return
        box: list[Any] = [None] * self.tp_size
        dist.all_gather_object(box, repr(value), group=self.tp_group)
        start = _first_difference(box)
        lines = "\n".join(f"  tensor-parallel rank {rank}: {_around(text, start)}" for rank, text in enumerate(box))
        raise LockstepError(f"the ranks disagree before {what}:\n{lines}")


def _first_difference(texts: list[str]) -> int:
    """The first index at which not all texts have the same character; where the shortest ends if there is none."""
    columns = zip(*texts, strict=False)
    return next((i for i, column in enumerate(columns) if len(set(column)) > 1), min(map(len, texts)))


def _around(text: str, index: int, width: int = 400) -> str:
    """``width`` characters of ``text`` about ``index``."""
    start = max(0, index - width // 4)
    return ("..." if start else "") + text[start : start + width] + ("..." if len(text) > start + width else "")


def _portable(error: Exception) -> Exception:
    """The error itself if another rank can be sent it, else a FrameworkError with its text."""
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:  # noqa: BLE001 - any failure means the same: it cannot travel
        return FrameworkError(f"{type(error).__name__}: {error}")


def open_mesh(device: Device, *, tensor_parallel_size: int, timeout_s: float) -> Mesh:
    """Joins torchrun's process group, or makes one of this single process, and splits it into groups.

    Args:
        device: of this rank.
        tensor_parallel_size: ranks per copy of the model.
        timeout_s: after it the watchdog ends the run.

    Raises:
        ConfigError: the world does not divide into tensor-parallel groups, or the rendezvous port is taken.
    """
    _default_environment()
    world_size = int(os.environ["WORLD_SIZE"])
    if tensor_parallel_size < 1 or world_size % tensor_parallel_size:
        raise ConfigError(
            f"parallel.tensor_parallel_size={tensor_parallel_size} does not divide the {world_size} processes "
            f"torchrun started (--nproc_per_node)"
        )
    limit = timedelta(seconds=timeout_s + BACKSTOP_S)
    if not dist.is_initialized():
        try:
            _join(device.collective_backend, world_size, limit)
        except dist.DistNetworkError as error:
            raise ConfigError(
                f"cannot open the rendezvous at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}: {error}; "
                f"give torchrun another --master_port"
            ) from error
    rank = dist.get_rank()
    tp, dp = tensor_parallel_size, world_size // tensor_parallel_size
    mine: dict[str, dist.ProcessGroup] = {}
    for name, groups in (
        ("tp", [list(range(start, start + tp)) for start in range(0, world_size, tp)]),
        ("dp", [list(range(start, world_size, tp)) for start in range(tp)]),
    ):
        for ranks in groups:  # every rank takes part in making every group
            group = dist.new_group(ranks, timeout=limit)
            if rank in ranks:
                mine[name] = group
    return Mesh(
        rank=rank,
        world_size=world_size,
        tp_rank=rank % tp,
        tp_size=tp,
        dp_rank=rank // tp,
        dp_size=dp,
        tp_group=mine["tp"],
        dp_group=mine["dp"],
        watchdog=Watchdog(
            rank=rank,
            world_size=world_size,
            timeout_s=timeout_s,
            store=_store_of_this_start("watchdog") if world_size > 1 else None,
        ),
    )


def _join(backend: str, world_size: int, limit: timedelta) -> None:
    """Meets the other ranks: in the store of torchrun's agent where there is one, else as the environment says."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        dist.init_process_group(backend, timeout=limit)
        return
    rank = int(os.environ["RANK"])
    dist.init_process_group(
        backend, store=_store_of_this_start("ranks"), rank=rank, world_size=world_size, timeout=limit
    )


def _store_of_this_start(what: str) -> Any:
    """A connection to the store that the ranks meet in, with keys of this start only.

    torchrun (torch 2.13) keeps the store when it restarts the ranks. Without a prefix, a restarted rank can find the
    address that a dead one left there: "Gloo connectFullMesh failed: connection refused".
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False)  # type: ignore[attr-defined]
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"start_{start}/{what}", store)  # type: ignore[attr-defined]


def close_mesh() -> None:
    """Leaves the process group; the last thing a rank does.

    Without it the collectives' threads are still running when the interpreter ends, and now and then abort a process
    that has done its work (torch 2.13: "terminate called without an active exception", exit code -6).
    """
    if dist.is_initialized():
        dist.destroy_process_group()


def _default_environment() -> None:
    """What torchrun would have set, for a process started without it."""
    os.environ.setdefault("RANK", "0")
    os.environ.setdefault("LOCAL_RANK", "0")
    os.environ.setdefault("WORLD_SIZE", "1")
    os.environ.setdefault("LOCAL_WORLD_SIZE", "1")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    if "MASTER_PORT" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            os.environ["MASTER_PORT"] = str(probe.getsockname()[1])
