"""What two ranks go through for tests/test_distributed.py; runs under torchrun and returns what happened."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from framework.device import open_device
from framework.distributed import Mesh, open_mesh
from framework.errors import ConfigError, FrameworkError


class Unsendable(Exception):
    """An error that cannot be rebuilt from its arguments."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one} and {two}")


def outcome(call: Callable[[], Any]) -> dict[str, Any]:
    """The result, or the error's type and text; and the seconds it took."""
    start = time.monotonic()
    try:
        result: dict[str, Any] = {"result": call()}
    except Exception as error:  # noqa: BLE001 - the test looks at it
        result = {"error": type(error).__name__, "is_framework": isinstance(error, FrameworkError), "text": str(error)}
    return {**result, "seconds": time.monotonic() - start}


def _raise(error: Exception) -> None:
    raise error


def _made_by(rank: int, ran_on: list[int]) -> tuple[str, int]:
    ran_on.append(rank)
    return "made by", rank


def _agree(mesh: Mesh, failing: tuple[int, ...]) -> str:
    with mesh.agree_on_error("loading the model"):
        if mesh.rank in failing:
            raise ConfigError(f"rank {mesh.rank} cannot")
    return "went on"


def _lockstep(mesh: Mesh) -> dict[str, Any]:
    long = ["x" * 5000, mesh.tp_rank, "y" * 5000]
    for _ in range(3):  # the first collectives of a group connect its ranks
        mesh.check_lockstep("warming up", 0)
    return {
        "same": outcome(lambda: mesh.check_lockstep("generate", {"prompts": [1, 2], "seed": 3})),
        "different": outcome(lambda: mesh.check_lockstep("generate", {"prompts": [1, 2 + mesh.tp_rank], "seed": 3})),
        "long": outcome(lambda: mesh.check_lockstep("forward_backward", long)),
        "prefix": outcome(lambda: mesh.check_lockstep("optim_step", "ab" if mesh.tp_rank else "abc")),
        "one_replica": outcome(lambda: mesh.check_lockstep("generate", mesh.tp_rank if mesh.dp_rank else 0)),
        "again": outcome(lambda: mesh.check_lockstep("generate", 7)),
    }


def on_four_ranks() -> dict[str, Any]:
    """All conversations of two replicas of two ranks, then of four replicas of one."""
    device = open_device("cpu", local_rank=0)
    odd = outcome(lambda: open_mesh(device, tensor_parallel_size=3, timeout_s=30.0))
    mesh = open_mesh(device, tensor_parallel_size=2, timeout_s=30.0)
    ran_on: list[int] = []
    results: dict[str, Any] = {
        "odd": odd,
        "who": (mesh.rank, mesh.tp_rank, mesh.tp_size, mesh.dp_rank, mesh.dp_size, mesh.is_leader),
        "broadcast": mesh.broadcast({"rank": mesh.rank, "tokens": (1, 2)}),
        "leader": outcome(lambda: mesh.run_on_leader(lambda: _made_by(mesh.rank, ran_on))),
        "leader_error": outcome(lambda: mesh.run_on_leader(lambda: _raise(ConfigError("data.path is empty")))),
        "leader_odd_error": outcome(lambda: mesh.run_on_leader(lambda: _raise(Unsendable("this", "that")))),
        "leader_odd_result": outcome(lambda: mesh.run_on_leader(lambda: lambda: 3)),
        "agree": outcome(lambda: _agree(mesh, ())),
        "agree_one": outcome(lambda: _agree(mesh, (1,))),
        "agree_two": outcome(lambda: _agree(mesh, (1, 2))),
        "lockstep": _lockstep(mesh),
        "all_gather": mesh.all_gather(f"from {mesh.rank}"),
        "global_sum": mesh.global_sum([float(2**mesh.rank), 0.5]),
    }
    results["ran_on"] = ran_on
    replicas = open_mesh(device, tensor_parallel_size=1, timeout_s=30.0)
    results["replicas"] = {
        "who": (replicas.tp_size, replicas.dp_rank, replicas.dp_size, replicas.is_leader),
        "global_sum": replicas.global_sum([1.0 + replicas.rank, 0.1]),
        "broadcast": replicas.broadcast(replicas.rank),
        "lockstep": outcome(lambda: replicas.check_lockstep("generate", replicas.rank)),
    }
    replicas.barrier()
    return results


def raise_on(failing: int) -> str:
    """For the harness's own test: one rank raises, the other would wait for long."""
    if int(os.environ["RANK"]) == failing:
        raise RuntimeError("this rank gives up")
    time.sleep(60)
    return "never seen"
