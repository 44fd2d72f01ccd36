"""MathVerify: the reward for mathematical answers, by the library math-verify in processes of their own.

Mathematically equal is right: ``\\frac{1}{2}`` for ``0.5``. The answer is looked for in ``\\boxed{}`` first, then in
what stands at the end. An expression that makes the comparison run too long or end its process earns nothing.
"""

from __future__ import annotations

import json
import queue
import select
import subprocess
import sys
import threading
from typing import IO

from framework.environments import math_child
from framework.errors import EnvironmentFailure

START_LIMIT_S = 60.0


class MathVerify:
    """``reward(completion, answer=...)``: 1.0 if they are mathematically equal, else 0.0. Safe from several threads.

    Args:
        num_processes: comparisons at once; each process starts when it is first needed.
        timeout_s: of one comparison.
    """

    def __init__(self, *, num_processes: int = 2, timeout_s: float = 15.0) -> None:
        self._timeout_s = timeout_s
        self._idle: queue.LifoQueue[_Child | None] = queue.LifoQueue()
        for _ in range(num_processes):
            self._idle.put(None)

    def __call__(self, completion: str, *, answer: str, **_: object) -> float:
        """Compares.

        Raises:
            EnvironmentFailure: math-verify cannot be started.
            ValueError: it cannot read the reference answer.
        """
        gold = answer if "$" in answer or "\\boxed" in answer else f"${answer}$"
        child = self._idle.get()
        try:
            child = child or _Child()
            reply = child.ask({"gold": gold, "completion": completion}, timeout_s=self._timeout_s)
            if reply is None:
                child.kill()
                child = None
                return 0.0
        finally:
            self._idle.put(child)
        if "error" in reply:
            raise ValueError(f"{reply['error']} {answer!r}")
        return float(reply["correct"] is True)


class _Child:
    """One running math_child.py. It ends when this process does: its standard input then ends."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", math_child.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._requests: IO[str] = self._process.stdin
        self._answers: IO[str] = self._process.stdout
        # Drained for ever, so that a talkative library cannot fill the pipe and stop.
        self._complaints: list[str] = []
        threading.Thread(target=self._listen, args=(self._process.stderr,), daemon=True).start()
        if self._line(START_LIMIT_S) != "ready\n":
            self.kill()
            raise EnvironmentFailure(f"math-verify does not start: {''.join(self._complaints[-20:]).strip()}")

    def ask(self, request: dict[str, str], *, timeout_s: float) -> dict[str, object] | None:
        """The answer, or None when the process took too long or ended."""
        try:
            self._requests.write(json.dumps(request) + "\n")
            self._requests.flush()
        except BrokenPipeError:
            return None
        line = self._line(timeout_s)
        answer: dict[str, object] | None = json.loads(line) if line else None
        return answer

    def kill(self) -> None:
        """Ends the process now."""
        self._process.kill()
        self._process.wait()

    def _line(self, timeout_s: float) -> str:
        ready, _, _ = select.select([self._answers], [], [], timeout_s)
        return self._answers.readline() if ready else ""

    def _listen(self, stream: IO[str]) -> None:
        for line in stream:
            self._complaints = [*self._complaints[-19:], line]
