"""What a user can get wrong when starting the service: found before a model is loaded."""

from __future__ import annotations

import socket
import sys
import time
from pathlib import Path

from tests.ranks import free_port, run_bounded


def test_a_taken_port_is_named_at_once(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=1", "--master_addr=127.0.0.1"]
        command += [f"--master_port={free_port()}", "launch/serve.py", "model.name_or_path=tiny-random/qwen3"]
        command += [f"service.port={port}", f"service.data_dir={tmp_path / 'data'}"]
        began = time.monotonic()
        code = run_bounded(command, tmp_path / "output.txt", timeout_s=120)
    output = (tmp_path / "output.txt").read_text()
    assert code not in (0, None), output[-2000:]
    assert f"error: ConfigError: service.host=127.0.0.1, service.port={port} cannot be bound" in output
    assert time.monotonic() - began < 60
    assert not (tmp_path / "data").exists()
