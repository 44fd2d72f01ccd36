"""What every benchmark writes: its figures with the command, the machine and the versions, as JSON."""

from __future__ import annotations

import json
import platform
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from framework.runtime import versions


def write(path: Path, figures: Any) -> None:
    """Writes ``path``; figures are plain containers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    command = " ".join(["python -m", f"benchmarks.gpu.{Path(sys.argv[0]).stem}", *sys.argv[1:]])
    record = {"command": command, "device": where, "versions": versions(), "figures": figures}
    path.write_text(json.dumps(record, indent=1))


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Columns aligned, the first row's keys as head."""
    if not rows:
        return "(no rows)"
    cells = [list(rows[0])] + [[_cell(value) for value in row.values()] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    return "\n".join("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)) for line in cells)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """p50, p90, p99 and the largest, in milliseconds."""
    ordered = sorted(seconds)
    cuts = statistics.quantiles(ordered, n=100, method="inclusive") if len(ordered) > 1 else ordered * 99
    return {
        "p50_ms": 1e3 * statistics.median(ordered),
        "p90_ms": 1e3 * cuts[89],
        "p99_ms": 1e3 * cuts[98],
        "max_ms": 1e3 * ordered[-1],
    }
