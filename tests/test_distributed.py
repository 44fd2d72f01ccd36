"""The conversations of a lockstep group on two and four real ranks: one word for all, one error for all, no hang."""

from __future__ import annotations

import socket
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.ranks import RanksFailed, run_bounded, run_ranks

Ranks = list[dict[str, Any]]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """Two replicas of two tensor-parallel ranks: (0, 1) and (2, 3)."""
    return run_ranks("tests.lockstep_scenario:on_four_ranks", tmp_path_factory.mktemp("four"), nproc=4, timeout_s=90.0)


def test_who_is_who(ranks: Ranks) -> None:
    assert [rank["who"] for rank in ranks] == [
        (0, 0, 2, 0, 2, True),
        (1, 1, 2, 0, 2, False),
        (2, 0, 2, 1, 2, True),
        (3, 1, 2, 1, 2, False),
    ]
    assert [rank["replicas"]["who"] for rank in ranks] == [(1, i, 4, True) for i in range(4)]


def test_a_size_that_does_not_divide_the_world_is_refused(ranks: Ranks) -> None:
    for rank in ranks:
        assert rank["odd"]["error"] == "ConfigError"
        assert "parallel.tensor_parallel_size=3 does not divide the 4 processes" in rank["odd"]["text"]


def test_broadcast_gives_the_leaders_value(ranks: Ranks) -> None:
    assert [rank["broadcast"] for rank in ranks] == [{"rank": leader, "tokens": (1, 2)} for leader in (0, 0, 2, 2)]
    assert [rank["replicas"]["broadcast"] for rank in ranks] == [0, 1, 2, 3]


def test_run_on_leader_runs_once_and_tells_its_group(ranks: Ranks) -> None:
    assert [rank["leader"]["result"] for rank in ranks] == [("made by", leader) for leader in (0, 0, 2, 2)]
    assert [rank["ran_on"] for rank in ranks] == [[0], [], [2], []]


def test_run_on_leader_raises_the_same_error_everywhere(ranks: Ranks) -> None:
    for rank in ranks:
        assert rank["leader_error"]["error"] == "ConfigError"
        assert rank["leader_error"]["text"] == "data.path is empty"


def test_run_on_leader_carries_what_cannot_be_sent_as_words(ranks: Ranks) -> None:
    for rank in ranks:
        assert rank["leader_odd_error"]["is_framework"]
        assert rank["leader_odd_error"]["text"] == "Unsendable: this and that"
        assert "pickle" in rank["leader_odd_result"]["text"]
        assert rank["leader_odd_result"]["seconds"] < 1.0


def test_agree_on_error_lets_no_rank_go_on(ranks: Ranks) -> None:
    assert [rank["agree"]["result"] for rank in ranks] == ["went on"] * 4
    own, told = "ConfigError", "FrameworkError"
    assert [rank["agree_one"]["error"] for rank in ranks] == [told, own, told, told]
    for rank in (0, 2, 3):
        assert ranks[rank]["agree_one"]["text"] == "loading the model failed on rank 1: ConfigError: rank 1 cannot"
    assert [rank["agree_two"]["error"] for rank in ranks] == [told, own, own, told]
    assert ranks[2]["agree_two"]["text"] == "rank 2 cannot"


def test_lockstep_passes_when_ranks_agree(ranks: Ranks) -> None:
    for rank in ranks:
        assert rank["lockstep"]["same"]["result"] is None
        assert rank["lockstep"]["again"]["result"] is None, "the group still works after an error"


def test_lockstep_raises_on_both_ranks_with_both_values_within_a_second(ranks: Ranks) -> None:
    for rank in ranks:
        found = rank["lockstep"]["different"]
        assert found["error"] == "LockstepError"
        assert found["seconds"] < 1.0
        assert found["text"] == (
            "the ranks disagree before generate:\n"
            "  tensor-parallel rank 0: {'prompts': [1, 2], 'seed': 3}\n"
            "  tensor-parallel rank 1: {'prompts': [1, 3], 'seed': 3}"
        )


def test_lockstep_compares_within_a_group_only(ranks: Ranks) -> None:
    assert ["error" in rank["lockstep"]["one_replica"] for rank in ranks] == [False, False, True, True]
    assert all("result" in rank["replicas"]["lockstep"] for rank in ranks), "replicas may differ"


def test_lockstep_shows_the_same_place_of_long_values(ranks: Ranks) -> None:
    _, first, second = ranks[0]["lockstep"]["long"]["text"].split("\n")
    assert "xxx', 0, 'yyy" in first
    assert "xxx', 1, 'yyy" in second
    assert len(first) == len(second) < 500
    _, first, second = ranks[1]["lockstep"]["prefix"]["text"].split("\n")
    assert (first[-5:], second[-4:]) == ("'abc'", "'ab'")


def test_sums_go_over_replicas_and_gathers_over_the_world(ranks: Ranks) -> None:
    assert [rank["global_sum"] for rank in ranks] == [[5.0, 1.0], [10.0, 1.0], [5.0, 1.0], [10.0, 1.0]]
    assert [rank["replicas"]["global_sum"] for rank in ranks] == [[10.0, 0.4]] * 4
    assert [rank["all_gather"] for rank in ranks] == [[f"from {i}" for i in range(4)]] * 4


OPEN_MESH = """
from framework.device import open_device
from framework.distributed import open_mesh
open_mesh(open_device("cpu", local_rank=0), tensor_parallel_size=1, timeout_s=5.0)
"""


def test_a_taken_port_is_one_clear_error(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        command = ["env", f"MASTER_PORT={port}", sys.executable, "-c", OPEN_MESH]
        code = run_bounded(command, tmp_path / "output.txt", timeout_s=60.0)
    last = (tmp_path / "output.txt").read_text().strip().splitlines()[-1]
    assert code == 1
    assert "ConfigError: cannot open the rendezvous at 127.0.0.1:" + port in last
    assert "--master_port" in last


def test_the_harness_reports_a_rank_that_raises(tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(RanksFailed, match=r"(?s)exit code 1.*rank 1\n.*RuntimeError: this rank gives up"):
        run_ranks("tests.lockstep_scenario:raise_on", tmp_path, timeout_s=50.0, failing=1)
    assert time.monotonic() - start < 45, "torchrun stops the others"


FAMILY = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)", sys.argv[1]], start_new_session=True)
time.sleep(300)
"""


def test_the_harness_kills_what_takes_too_long_and_its_children(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FAMILY, str(tmp_path)]
    assert run_bounded(command, tmp_path / "output.txt", timeout_s=1.5) is None
    killed = [p for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in (p.info["cmdline"] or ())]
    _, alive = psutil.wait_procs(killed, timeout=20)  # a killed process may take a moment to go
    assert [p.pid for p in alive if p.status() != psutil.STATUS_ZOMBIE] == []
