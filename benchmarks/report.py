"""What every benchmark on a CPU shares: the machine it ran on, other processes it starts, a table, and a JSON file."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"


def machine() -> dict[str, Any]:
    """The processor, its cores, the memory, and how busy the machine is with other work."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
    flags = next((line for line in lines if line.startswith("flags")), "").split()
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "matrix_instructions": [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags],
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_before": round(os.getloadavg()[0], 1),
    }


def in_process(command: Sequence[str], job: Mapping[str, Any]) -> Any:
    """Runs ``command JOB RESULT`` from the repository's root and returns the result; both are JSON files."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(job["threads"]), "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory() as folder:
        job_file, result_file = Path(folder) / "job.json", Path(folder) / "result.json"
        job_file.write_text(json.dumps({**job, "scratch": folder}))
        done = subprocess.run(
            [*command, str(job_file), str(result_file)],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            sys.exit(f"{' '.join(command)} failed with code {done.returncode}:\n{done.stderr[-4000:]}")
        return json.loads(result_file.read_text())


def median(values: Sequence[float]) -> float:
    """The middle one."""
    return statistics.median(values)


def spread(values: Sequence[float]) -> dict[str, float]:
    """The median with the smallest and the largest, so that noise shows."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def write(name: str, figures: Mapping[str, Any], *, machine: Mapping[str, Any], versions: Mapping[str, str]) -> None:
    """Writes ``results/<name>-cpu.json`` and says so."""
    RESULTS.mkdir(exist_ok=True)
    words = [Path(sys.argv[0]).stem, *sys.argv[1:]]
    record = {
        "command": f"python -m benchmarks.{' '.join(words)}",
        "machine": machine,
        "versions": versions,
        **figures,
    }
    path = RESULTS / f"{name}-cpu.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written: {path.relative_to(ROOT)}")


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Columns aligned, the first row's keys as head."""
    lines = [list(rows[0])] + [[_cell(row.get(key, "")) for key in rows[0]] for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(rows[0]))]
    return "\n".join("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)) for line in lines)


def _cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
