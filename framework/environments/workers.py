"""Runs environment calls in daemon threads, each under a time limit.

Not ``concurrent.futures``: its threads are joined when the interpreter exits, so one reward that hangs would keep a
failed run alive for ever. A thread cannot be killed, so a call past its limit is abandoned and reported.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType

_STOP = None


@dataclass(slots=True, eq=False)
class Call:
    """One call and, once it ended, what came of it: exactly one of ``value`` and ``error`` unless it timed out."""

    key: int
    """The caller's number for it."""
    function: Callable[[], object]
    started_s: float | None = None
    """``time.monotonic()`` when a thread took it; None while it waits for a thread."""
    value: object = None
    error: Exception | None = None
    timed_out: bool = False
    seconds: float = field(default=0.0)
    """How long it ran."""


class Workers:
    """At most ``num_threads`` calls at once; results in the order in which calls end.

    Example:
        with Workers(num_threads=8, timeout_s=60.0) as workers:
            workers.submit(0, lambda: 1 + 1)
            call = workers.next_ended()  # call.key == 0, call.value == 2
    """

    def __init__(self, *, num_threads: int, timeout_s: float) -> None:
        self._num_threads = num_threads
        self._timeout_s = timeout_s
        self._waiting: queue.SimpleQueue[Call | None] = queue.SimpleQueue()
        self._ended: queue.SimpleQueue[Call] = queue.SimpleQueue()
        self._pending: dict[int, Call] = {}
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for _ in self._threads:
            self._waiting.put(_STOP)

    @property
    def num_pending(self) -> int:
        """Calls submitted and not yet handed out by :meth:`next_ended`."""
        return len(self._pending)

    def submit(self, key: int, function: Callable[[], object]) -> None:
        """Queues a call; ``key`` is unique among the pending ones."""
        assert key not in self._pending, f"call {key} is already pending"
        call = Call(key, function)
        self._pending[key] = call
        self._waiting.put(call)
        if len(self._threads) < min(self._num_threads, len(self._pending)):
            thread = threading.Thread(target=self._work, name=f"environment-{len(self._threads)}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def next_ended(self) -> Call:
        """Blocks until a pending call ends or passes its time limit, which counts from when a thread took it."""
        assert self._pending, "nothing is pending"
        while True:
            started = [call.started_s for call in self._pending.values() if call.started_s is not None]
            deadline = min(started, default=time.monotonic()) + self._timeout_s
            try:
                call = self._ended.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                overdue = self._overdue()
                if overdue is None:
                    continue
                call = overdue
            if self._pending.pop(call.key, None) is not None:  # else it was reported overdue before
                return call

    def _overdue(self) -> Call | None:
        now = time.monotonic()
        for call in self._pending.values():
            if call.started_s is not None and now - call.started_s >= self._timeout_s:
                return Call(call.key, call.function, timed_out=True, seconds=now - call.started_s)
        return None

    def _work(self) -> None:
        while True:
            call = self._waiting.get()
            if call is _STOP:
                return
            call.started_s = time.monotonic()
            try:
                call.value = call.function()
            except Exception as error:  # noqa: BLE001 - a user's code may raise anything; the caller reports it
                call.error = error
            call.seconds = time.monotonic() - call.started_s
            self._ended.put(call)
