"""A rank that sleeps ends the run within the limit, and both ranks' stacks say where they were."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from framework.watchdog import EXIT_CODE
from tests.ranks import ROOT, RanksFailed, clean_environment, run_ranks

LIMIT_S = 2.0


def test_a_late_collective_leaves_every_ranks_stacks_and_ends_the_run(tmp_path: Path) -> None:
    stacks = tmp_path / "run"
    stacks.mkdir()
    with pytest.raises(RanksFailed) as failure:
        run_ranks(
            "tests.watchdog_scenario:one_rank_sleeps",
            tmp_path / "out",
            timeout_s=60,
            run_dir=stacks,
            limit_s=LIMIT_S,
            sleeper=1,
        )
    ended = max((stacks / f"stacks_rank{rank}.txt").stat().st_mtime for rank in range(2))
    started = min(float((stacks / f"started{rank}").read_text()) for rank in range(2))
    assert LIMIT_S <= ended - started <= LIMIT_S + 4.0
    waiting, sleeping = ((stacks / f"stacks_rank{rank}.txt").read_text() for rank in range(2))
    reason = f"watchdog: rank 0: all_gather has taken more than parallel.timeout_s={LIMIT_S:g}; stacks of rank"
    assert waiting.startswith(reason + " 0:")
    assert sleeping.startswith(reason + " 1:")
    assert "in all_gather\n" in waiting
    assert "in fetch_something_for_ever\n" in sleeping
    output = (tmp_path / "out" / "output.txt").read_text()
    assert "in fetch_something_for_ever" in output
    assert f"exitcode  : {EXIT_CODE}" in output
    assert "exit code 1" in str(failure.value)


def test_signs_of_life_keep_a_long_phase_alive(tmp_path: Path) -> None:
    assert run_ranks("tests.watchdog_scenario:patient", tmp_path / "out", run_dir=tmp_path) == ["done", "done"]


ALONE = """
import sys, time
from pathlib import Path
from framework.watchdog import Watchdog

watchdog = Watchdog(rank=0, world_size=1, timeout_s=0.4, store=None)
watchdog.folder = Path(sys.argv[1])
if sys.argv[2] == "late":
    with watchdog.watch("an engine step"):
        time.sleep(60)
"""


@pytest.mark.parametrize(("what", "code"), [("late", EXIT_CODE), ("done", 0)])
def test_one_process_alone(tmp_path: Path, what: str, code: int) -> None:
    """Also: the thread does not keep a finished process alive."""
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(tmp_path / "run"), what],
        cwd=ROOT,
        env=clean_environment() | {"PATH": os.environ["PATH"]},
        timeout=30,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, done.stderr
    assert time.monotonic() - start < 20
    if what == "late":
        assert "an engine step has taken more than parallel.timeout_s=0.4" in done.stderr
        assert (tmp_path / "run" / "stacks_rank0.txt").exists()
