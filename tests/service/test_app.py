"""Fuzzing: schemathesis sends what the OpenAPI document allows and what it does not; no answer may be a 5xx."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from framework.client import Client
from framework.service.settings import ServiceConfig
from tests.service.server import start

REQUESTS = 5000


@pytest.fixture
def quick(config: ServiceConfig) -> ServiceConfig:
    """Polls for futures end at once: nothing the fuzzer waits for ever comes."""
    config.poll_s = 0.01
    return config


def test_thousands_of_odd_requests_are_answered_without_a_server_error(quick: ServiceConfig, tmp_path: Path) -> None:
    server = start(quick)
    command = [str(Path(sys.executable).with_name("schemathesis")), "run", f"{server.url}/openapi.json"]
    options = ["--checks", "not_a_server_error", "--phases", "examples,coverage,fuzzing", "--generation-deterministic"]
    report = tmp_path / "events.ndjson"
    options += ["--max-examples", "100", "--no-shrink", "--report-ndjson-path", str(report), "--continue-on-failure"]
    options += ["--suppress-health-check", "all", "--warnings", "off", "--request-timeout", "20"]
    done = subprocess.run(
        [*command, *options],
        cwd=tmp_path,
        env={**os.environ, "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    sent = sum(len(event) for event in _recorded(report))
    assert sent >= REQUESTS, f"only {sent} requests\n{done.stdout[-1500:]}"
    with Client(server.url) as client:
        model_id = client.add_lora(rank=2)["model_id"]
        assert client.forward_backward(model_id, [{"prompt": "a", "completion": "b"}])["loss"] > 0.0
        client.optim_step(model_id)
        assert len(client.sample(["a"], model_id=model_id, sampling_params={"max_tokens": 3})["completions"]) == 1
    assert httpx.get(f"{server.url}/healthz").status_code == 200
    server.stop()


def _recorded(report: Path) -> list[dict[str, object]]:
    """Interactions of each scenario that sent something."""
    events = [json.loads(line) for line in report.read_text().splitlines()]
    recorders = [e["ScenarioFinished"]["recorder"] for e in events if "ScenarioFinished" in e]
    return [recorder["interactions"] for recorder in recorders if "interactions" in recorder]
