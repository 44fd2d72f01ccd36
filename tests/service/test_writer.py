"""The writer: newest content only, nothing lost, failures told to whoever relies on the files."""

from __future__ import annotations

import threading
import time
from functools import partial
from pathlib import Path

import pytest

from framework.service.writer import MAX_WAITING, Writer


def test_flush_waits_for_everything_and_cuts_the_delay_short() -> None:
    background, written = Writer(delay_s=60.0), []
    for number in range(3):
        background.put(Path(str(number)), lambda number=number: written.append(number))
    assert written == []
    background.flush()
    assert written == [0, 1, 2]


def test_what_is_put_is_written_soon_without_a_flush() -> None:
    background, done = Writer(delay_s=2.0), threading.Event()
    background.put(Path("a"), done.set)
    assert not done.wait(0.2), "the processors belong to the next sample first"
    assert done.wait(30.0)


def test_only_the_newest_content_of_a_folder_is_written() -> None:
    background, written = Writer(), []
    for text in ("old", "new"):
        background.put(Path("a"), lambda text=text: written.append(text))
    background.flush()
    assert written == ["new"]


def test_more_than_may_wait_waits_for_the_disk() -> None:
    background, gate, written = Writer(), threading.Event(), []

    def slow(number: int) -> None:
        gate.wait()
        written.append(number)

    def put_all() -> None:
        for number in range(MAX_WAITING + 2):
            background.put(Path(str(number)), partial(slow, number))

    putting = threading.Thread(target=put_all)
    putting.start()
    putting.join(timeout=1.0)
    assert putting.is_alive()
    gate.set()
    putting.join()
    background.flush()
    assert len(written) == MAX_WAITING + 2


def test_a_failure_is_tried_again_and_then_told() -> None:
    background, tries, full = Writer(), [], [True]

    def write() -> None:
        tries.append(time.monotonic())
        if full:
            raise OSError("disk full")

    background.put(Path("a"), write)
    for _ in range(2):
        with pytest.raises(OSError, match="disk full"):
            background.flush()
    full.clear()
    background.flush()
    background.flush()
    assert len(tries) == 4, "once by the thread, once by each flush until it succeeds"
