"""Memory stays flat over steps and over adapters, in the real pair; benchmarks/memory_flat.py runs it longer."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.ranks import ROOT, clean_environment


def test_a_hundred_steps_and_ten_adapters_leave_no_more_memory_taken() -> None:
    command = [sys.executable, "benchmarks/memory_flat.py", "--steps", "100", "--adapters", "10"]
    done = subprocess.run(
        command, cwd=ROOT, env=clean_environment(), capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["growth"] <= 1.03
    assert seen["adapters_growth"] <= 1.03
    assert seen["warm_mib"] > 100
