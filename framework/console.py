"""A run on the console: one compact line per step. One of the tracker's sinks (tracking.py)."""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

CONSOLE = (
    ("reward", "reward/mean"),
    ("±", "reward/std"),
    ("correct", "reward/env/correct"),
    ("accuracy", "eval/accuracy"),
    ("eval loss", "eval/loss"),
    ("loss", "loss/total"),
    ("parity", "parity/logprob_abs_diff_mean"),
    ("grad", "optim/grad_norm"),
)
"""Label and metric of the console's columns, in order; a column whose metric was not logged is left out."""


class ConsoleSink:
    """One line per step: progress, the metrics of :data:`CONSOLE`, the seconds split, time left. Needs no tty."""

    def __init__(self, *, every: int, num_steps: int, first_step: int) -> None:
        self._every = every
        self._num_steps = num_steps
        self._last_step = first_step
        self._last_time_s = time.monotonic()
        self._recent_s: deque[float] = deque(maxlen=20)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        now_s = time.monotonic()
        if step > self._last_step:
            self._recent_s.append((now_s - self._last_time_s) / (step - self._last_step))
            self._last_step, self._last_time_s = step, now_s
        is_eval = any(name.startswith("eval/") for name in metrics)
        if step % self._every == 0 or step == self._num_steps or is_eval:
            print(self._line(step, metrics), flush=True)

    def log_table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Tables are too wide for the console."""

    def close(self, summary: Mapping[str, Any], exit_code: int) -> None:
        for name, value in sorted(summary.items()):
            if not isinstance(value, Mapping):
                print(f"  {name:<36} {_short(value) if isinstance(value, float) else value}", flush=True)

    def _line(self, step: int, metrics: Mapping[str, float]) -> str:
        width = len(str(self._num_steps))
        parts = [f"step {step:>{width}}/{self._num_steps} {step / max(self._num_steps, 1):4.0%}"]
        parts += [f"{label} {_short(metrics[name])}" for label, name in CONSOLE if name in metrics]
        seconds = {
            name.removeprefix("time/").removesuffix("_s"): value
            for name, value in metrics.items()
            if re.fullmatch(r"time/\w+(?<!_per)_s", name)
        }
        total = seconds.pop("step", None)
        if total is not None:
            split = ", ".join(f"{phase} {_short(value)}" for phase, value in seconds.items())
            parts.append(f"{total:.1f} s" + (f" ({split})" if split else ""))
        if self._recent_s and step < self._num_steps:
            left_s = sum(self._recent_s) / len(self._recent_s) * (self._num_steps - step)
            parts.append(f"left {_clock(left_s)}")
        return "  ".join(parts).replace("  ± ", " ±")


def _short(value: float) -> str:
    """Three significant digits, without an exponent where there is room."""
    return f"{value:.3g}"


def _clock(seconds: float) -> str:
    """Example: 3725 gives ``1:02:05``, 65 gives ``1:05``."""
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"
