"""Workers: results as they end, time limits, and threads that never keep a process alive."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

from framework.environments.workers import Workers


def test_results_come_as_calls_end() -> None:
    release = threading.Event()
    with Workers(num_threads=2, timeout_s=5.0) as workers:
        workers.submit(0, lambda: release.wait(5))
        workers.submit(1, lambda: "quick")
        first = workers.next_ended()
        release.set()
        second = workers.next_ended()
    assert (first.key, first.value, first.error) == (1, "quick", None)
    assert (second.key, second.value) == (0, True)
    assert workers.num_pending == 0


def test_an_error_is_handed_over() -> None:
    with Workers(num_threads=1, timeout_s=5.0) as workers:
        workers.submit(7, lambda: 1 / 0)
        call = workers.next_ended()
    assert (call.key, call.timed_out, type(call.error)) == (7, False, ZeroDivisionError)


def test_no_more_calls_at_once_than_threads() -> None:
    running: list[int] = []
    most: list[int] = []
    three = threading.Barrier(3, timeout=20)  # no call ends before three run at once

    def call() -> None:
        running.append(1)
        most.append(len(running))
        three.wait()
        running.pop()

    with Workers(num_threads=3, timeout_s=30.0) as workers:
        for key in range(12):
            workers.submit(key, call)
        errors = [workers.next_ended().error for _ in range(12)]
    assert errors == [None] * 12
    assert max(most) == 3


def test_a_call_that_hangs_is_reported_though_others_wait_behind_it() -> None:
    never = threading.Event()
    started = time.monotonic()
    with Workers(num_threads=1, timeout_s=0.2) as workers:
        workers.submit(0, never.wait)
        workers.submit(1, lambda: "behind")
        call = workers.next_ended()
    assert (call.key, call.timed_out) == (0, True)
    assert 0.2 <= time.monotonic() - started < 20.0
    never.set()


def test_the_limit_counts_from_the_start_of_a_call_not_from_its_place_in_the_queue() -> None:
    with Workers(num_threads=1, timeout_s=1.5) as workers:
        for key in range(4):
            workers.submit(key, lambda: time.sleep(0.5))
        assert not any(workers.next_ended().timed_out for _ in range(4))


def test_a_hanging_call_does_not_keep_the_process_alive() -> None:
    code = (
        "import threading\n"
        "from framework.environments.workers import Workers\n"
        "with Workers(num_threads=1, timeout_s=0.1) as workers:\n"
        "    workers.submit(0, threading.Event().wait)\n"
        "    assert workers.next_ended().timed_out\n"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=30, check=False).returncode == 0
