"""Watchdog: a collective that is late ends the run, and every rank leaves its stacks behind.

A rank that sleeps, loops or died leaves the others waiting. Each rank's watchdog thread looks at how long its main
thread has been inside a watched call (every collective of the Mesh, every engine step, every microbatch). The first
that finds one late says so in the store that torchrun keeps; all ranks then write the stacks of all their threads to
``stacks_rank<N>.txt`` in the run's folder and to stderr, and exit with code 70. The collectives' own limit comes
:data:`BACKSTOP_S` later, for a process whose threads cannot run.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

EXIT_CODE = 70
"""Of every rank that a watchdog ended (EX_SOFTWARE of sysexits.h)."""
BACKSTOP_S = 60.0
_OTHERS_S = 5.0
"""How long a rank waits for the others' stacks before it exits."""


class Store(Protocol):
    """The part of torch's Store that is needed here."""

    def check(self, keys: list[str]) -> bool: ...

    def get(self, key: str) -> bytes: ...

    def set(self, key: str, value: str) -> None: ...

    def add(self, key: str, amount: int) -> int: ...


class Watchdog:
    """One per rank, see the module."""

    def __init__(self, *, rank: int, world_size: int, timeout_s: float, store: Store | None) -> None:
        """Starts the thread, which ends with the main thread.

        Args:
            rank: of this process in the world.
            world_size: how many stacks there will be.
            timeout_s: a watched call may take so long.
            store: shared by all ranks of this start; None where there is one rank.
        """
        self.folder: Path | None = None
        """Where the stacks are written besides stderr, once it is known."""
        self._rank, self._world_size, self._timeout_s, self._store = rank, world_size, timeout_s, store
        self._calls: list[tuple[str, float]] = []
        self._poll_s = min(0.5, timeout_s / 4)
        # Not a daemon: the interpreter waits for it, and does not tear down the store under it.
        threading.Thread(target=self._run, name="watchdog").start()

    @contextmanager
    def watch(self, what: str) -> Iterator[None]:
        """Lets the block take ``timeout_s``. A block inside it is a sign of life: the outer one's time starts again."""
        self._calls.append((what, time.monotonic()))
        try:
            yield
        finally:
            self._calls.pop()
            if self._calls:
                self._calls[-1] = (self._calls[-1][0], time.monotonic())

    def _run(self) -> None:
        while threading.main_thread().is_alive():
            late = self._late()
            try:
                if late is not None:
                    self._end(f"rank {self._rank}: {late}")
                if self._store is not None and self._store.check(["late"]):
                    self._end(self._store.get("late").decode(), told=True)
            except RuntimeError:  # torch's DistError: the store is gone, and with it the job
                return
            time.sleep(self._poll_s)

    def _late(self) -> str | None:
        calls = self._calls[-1:]
        if not calls or time.monotonic() - calls[0][1] < self._timeout_s:
            return None
        return f"{calls[0][0]} has taken more than parallel.timeout_s={self._timeout_s:g}"

    def _end(self, reason: str, *, told: bool = False) -> None:
        """Stacks of all threads, then exit. Ranks exit together: torchrun kills the rest when the first has gone."""
        if self._store is not None and not told:
            self._store.set("late", reason)
        text = f"watchdog: {reason}; stacks of rank {self._rank}:\n{_stacks()}"
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / f"stacks_rank{self._rank}.txt").write_text(text)
        sys.stderr.flush()
        os.write(2, text.encode())  # in one piece: the ranks share the terminal
        if self._store is not None:
            ended = self._store.add("ended", 1)
            deadline = time.monotonic() + _OTHERS_S
            while ended < self._world_size and time.monotonic() < deadline:
                time.sleep(0.05)
                ended = self._store.add("ended", 0)
        os._exit(EXIT_CODE)


def _stacks() -> str:
    """Of all threads of this process."""
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()
