"""Runs Python that a model wrote, in a process that can reach nothing.

Contained, by Linux namespaces and resource limits (sandbox_child.py): no network, not even loopback; no file of this
machine but the interpreter and the system's libraries, read-only; one empty ``/tmp`` in memory; no process outside is
visible; CPU time, wall time, memory per process, number of processes, file size and output are limited; every process
is killed at the end; no capability and no environment variable is inherited.

Not contained: flaws of the kernel (user namespaces are a large surface), side channels, memory summed over processes
(the limit is per process, their number is bounded), and how busy the machine gets within the limits. Where the kernel
or the container forbids user namespaces, nothing is run: :func:`run_python` raises.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from framework.environments import sandbox_child
from framework.errors import EnvironmentFailure


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxLimits:
    """What one run may use."""

    wall_s: float = 10.0
    cpu_s: int = 5
    """Processor seconds per process."""
    memory_mib: int = 512
    """Address space per process."""
    num_processes: int = 16
    """Processes and threads at once."""
    tmp_mib: int = 16
    """All files together."""
    output_bytes: int = 65_536
    """How much of standard output and of standard error is kept; a process that writes more than ``tmp_mib`` to one of
    them is killed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxResult:
    """What came of one run."""

    status: int
    """Exit status; 128 + n when signal n ended it."""
    stdout: str
    stderr: str
    timed_out: bool
    """It was killed at ``wall_s``."""


def run_python(source: str, *, stdin: str = "", limits: SandboxLimits | None = None) -> SandboxResult:
    """Runs Python source in a fresh sandbox with this interpreter and its standard library only.

    Args:
        source: the program; ``__name__`` is ``"__main__"``.
        stdin: what it can read.
        limits: None is the default ones.

    Raises:
        EnvironmentFailure: this machine cannot contain it, so it was not run.
    """
    limits = limits or SandboxLimits()
    interpreter = os.path.realpath(sys.executable)
    plan = {
        "readable": list(_readable()),
        "tmp_bytes": limits.tmp_mib * 2**20,
        "limits": {
            "RLIMIT_CPU": limits.cpu_s,
            "RLIMIT_AS": limits.memory_mib * 2**20,
            "RLIMIT_NPROC": limits.num_processes,
            "RLIMIT_NOFILE": 64,
            "RLIMIT_FSIZE": limits.tmp_mib * 2**20,
            "RLIMIT_CORE": 0,
        },
        # -S: no site-packages; the program gets the standard library.
        "argv": [interpreter, "-I", "-S", "-B", "-c", source],
    }
    command = [sys.executable, "-I", sandbox_child.__file__, json.dumps(plan)]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=out, stderr=err, start_new_session=True, env={}, cwd="/"
        )
        timed_out = False
        try:
            process.communicate(stdin.encode(), timeout=limits.wall_s)
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        stdout, stderr = _head(out.fileno(), limits.output_bytes), _head(err.fileno(), limits.output_bytes)
    if process.returncode == sandbox_child.REFUSED and stderr.startswith("sandbox refused:"):
        raise EnvironmentFailure(
            f"{stderr.strip()}. Code that a model wrote is not run without a sandbox; this machine must allow user "
            "namespaces (kernel.unprivileged_userns_clone=1, in a container also seccomp=unconfined)"
        )
    status = process.returncode if process.returncode >= 0 else 128 - process.returncode
    return SandboxResult(status=status, stdout=stdout, stderr=stderr, timed_out=timed_out)


def _head(descriptor: int, limit: int) -> str:
    return os.pread(descriptor, limit, 0).decode(errors="replace")


@cache
def _readable() -> tuple[str, ...]:
    """What the interpreter needs to start: itself, its standard library, the system's libraries."""
    candidates = ["/usr/lib", "/usr/lib64", "/lib", "/lib64", "/etc/ld.so.cache"]
    interpreter = Path(sys.executable).resolve()
    candidates += [str(interpreter), str(Path(sys.base_prefix) / "lib"), str(Path(os.__file__).parent)]
    found: list[str] = []
    for path in dict.fromkeys(candidates):
        inside = any(path.startswith(other + "/") and not Path(other).is_symlink() for other in found)
        if Path(path).exists() and not inside:
            found.append(path)
    return tuple(found)
