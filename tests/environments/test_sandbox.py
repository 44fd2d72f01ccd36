"""The sandbox, attacked: what it must contain is tried from inside, in programs that would succeed outside."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from framework.environments import sandbox_child
from framework.environments.sandbox import SandboxLimits, SandboxResult, run_python
from framework.errors import EnvironmentFailure


def contained() -> bool:
    """False where this machine allows no user namespaces; run_python then refuses, which is tested instead."""
    try:
        run_python("")
    except EnvironmentFailure:
        return False
    return True


needs_namespaces = pytest.mark.skipif(not contained(), reason="no user namespaces on this machine")


def inside(source: str, *, stdin: str = "", limits: SandboxLimits | None = None) -> SandboxResult:
    return run_python(source, stdin=stdin, limits=limits)


@needs_namespaces
def test_a_program_runs_and_reports() -> None:
    result = inside("import sys, json\nprint(json.loads(input())['a'] + 1)\nsys.exit(3)", stdin='{"a": 1}\n')
    assert (result.status, result.stdout, result.stderr, result.timed_out) == (3, "2\n", "", False)


@needs_namespaces
def test_there_is_no_network_not_even_loopback() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        result = inside(
            "import socket\n"
            f"for host, port in (('127.0.0.1', {port}), ('1.1.1.1', 53)):\n"
            "    try:\n"
            "        socket.create_connection((host, port), timeout=2)\n"
            "        print('connected')\n"
            "    except OSError as error:\n"
            "        print('refused')\n"
        )
    assert result.stdout == "refused\nrefused\n"


@needs_namespaces
def test_no_file_of_the_machine_can_be_read_or_changed(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("x")
    secret.chmod(0o666)
    result = inside(
        "import os\n"
        f"for path in ({str(secret)!r}, '/etc/passwd', '/proc/1/environ', os.path.expanduser('~/secret')):\n"
        "    print(os.path.exists(path))\n"
        "for path in (os.__file__, os.path.dirname(os.__file__) + '/new', '/usr/lib/new', '/new'):\n"
        "    try:\n"
        "        open(path, 'a')\n"
        "        print('written', path)\n"
        "    except OSError:\n"
        "        print('no')\n"
    )
    assert result.stdout == "False\n" * 4 + "no\n" * 4, result
    assert secret.read_text() == "x"


@needs_namespaces
def test_its_tmp_is_its_own_small_and_gone_afterwards() -> None:
    marker = f"sandbox-{os.getpid()}"
    result = inside(
        f"import os\nprint(os.listdir('/tmp'))\nopen('/tmp/{marker}', 'w').write('x')\n"
        "try:\n"
        "    for i in range(9): open(f'/tmp/{i}', 'wb').write(bytes(2**20))\n"
        "except OSError as error: print(error.strerror)\n",
        limits=SandboxLimits(tmp_mib=4),
    )
    assert result.stdout == "[]\nNo space left on device\n"
    assert not Path("/tmp", marker).exists()


@needs_namespaces
def test_it_has_no_environment_and_no_power(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "x")
    result = inside(
        "import ctypes, os\n"
        "print('SECRET_TOKEN' in os.environ, os.getuid() != 0)\n"
        "libc = ctypes.CDLL(None)\n"
        "print(libc.mount(b'none', b'/tmp', b'tmpfs', 0, None))\n"
        "try: os.setuid(0)\n"
        "except OSError: print('stays')\n"
    )
    assert result.stdout == "False True\n-1\nstays\n"


@needs_namespaces
def test_no_process_outside_can_be_seen_or_signalled() -> None:
    result = inside(
        f"import os\ntry: os.kill({os.getpid()}, 0)\nexcept OSError as e: print(e.strerror)\nprint(os.getppid())"
    )
    assert result.stdout == "No such process\n0\n"


def sleepers() -> list[str]:
    """Processes of this machine with the marker of the next test on their command line."""
    listed = subprocess.run(["ps", "ax", "-o", "args"], capture_output=True, text=True, check=True).stdout
    return [line for line in listed.splitlines() if "sandboxed-sleeper" in line]


@needs_namespaces
def test_time_is_limited_and_nothing_is_left_running() -> None:
    started = time.monotonic()
    source = "import os, time\nfor _ in range(3): os.fork()\nprint('sandboxed-sleeper', flush=True)\ntime.sleep(60)"
    result = inside(source, limits=SandboxLimits(wall_s=5.0))
    assert (result.timed_out, result.stdout.count("sandboxed-sleeper")) == (True, 8)
    assert time.monotonic() - started < 40  # the program sleeps for 60
    while sleepers() and time.monotonic() - started < 50:
        time.sleep(0.1)
    assert sleepers() == []


@needs_namespaces
def test_processor_time_is_limited() -> None:
    result = inside("while True: pass", limits=SandboxLimits(cpu_s=1, wall_s=120))
    assert (result.status, result.timed_out) in ((128 + 9, False), (128 + 24, False))


@needs_namespaces
def test_memory_is_limited() -> None:
    result = inside("x = bytearray(2**30)", limits=SandboxLimits(memory_mib=256))
    assert result.status == 1
    assert "MemoryError" in result.stderr


@needs_namespaces
def test_the_number_of_processes_is_limited() -> None:
    source = (
        "import os, time\n"
        "n = 0\n"
        "try:\n"
        "    while n < 100:\n"
        "        if os.fork() == 0: time.sleep(30)\n"
        "        n += 1\n"
        "except BlockingIOError: print(n)\n"
    )
    assert 1 <= int(inside(source, limits=SandboxLimits(num_processes=8, wall_s=30)).stdout) <= 8


@needs_namespaces
def test_output_is_cut_and_a_flood_is_ended() -> None:
    result = inside("print('x' * 100_000)", limits=SandboxLimits(output_bytes=1000))
    assert (result.status, result.stdout) == (0, "x" * 1000)
    flood = inside("while True: print('x' * 10_000)", limits=SandboxLimits(tmp_mib=1, cpu_s=30, wall_s=120))
    assert (flood.timed_out, len(flood.stdout)) == (False, 65_536)
    assert flood.status != 0


def test_without_a_sandbox_nothing_runs() -> None:
    plan = '{"readable": [], "tmp_bytes": 1048576, "limits": {}, "argv": ["/no/such/program"]}'
    done = subprocess.run(
        [sys.executable, "-I", sandbox_child.__file__, plan], capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == sandbox_child.REFUSED
    assert done.stderr.startswith("sandbox refused: ")
