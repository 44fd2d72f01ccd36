"""A service that is stopped or killed, in a process of its own, and started again on the same data directory."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from framework.client import Client
from framework.service.settings import ServiceConfig
from tests.ranks import free_port
from tests.service.server import start
from tests.service.toy_pair import toy_backend

ROWS = [{"prompt": "abc", "completion": "def"}]
ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Process:
    """A toy service that can be killed and started again under the same address."""

    data_dir: Path
    snapshot_after_s: float = 1e9
    seconds_per_call: float = 0.0
    port: int = 0
    process: subprocess.Popen[bytes] | None = None
    client: Client = field(init=False)

    def __post_init__(self) -> None:
        self.port = free_port()
        self.client = Client(self.url, retry_s=60.0)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        options = [str(self.port), str(self.data_dir), str(self.snapshot_after_s), str(self.seconds_per_call)]
        handler = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # what started the tests may ignore it (nohup)
        self.process = subprocess.Popen([sys.executable, "-m", "tests.service.toy_main", *options], cwd=ROOT)
        signal.signal(signal.SIGHUP, handler)

    def end(self, number: signal.Signals) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(timeout=30)

    def outcome(self, request_id: str) -> httpx.Response:
        """Polls as the SDK does."""
        while True:
            answer = httpx.post(self.url + "/api/v1/retrieve_future", json={"request_id": request_id}, timeout=30)
            if answer.status_code != 408:
                return answer

    def post(self, path: str, **body: Any) -> dict[str, Any]:
        answer: dict[str, Any] = httpx.post(self.url + path, json=body, timeout=30).json()
        return answer


@pytest.fixture
def process(tmp_path: Path) -> Iterator[Process]:
    server = Process(data_dir=tmp_path / "data")
    yield server
    if server.process is not None and server.process.poll() is None:
        server.process.kill()
        server.process.wait()


def create(url: str, *, seed: int) -> str:
    """A model without a PEFT folder (importing peft takes each new process seconds)."""
    session = httpx.post(url + "/api/v1/create_session", json={}).json()["session_id"]
    body = {"session_id": session, "model_seq_id": 0, "lora_config": {"rank": 4, "seed": seed}}
    created = httpx.post(url + "/api/v1/create_model", json=body).json()
    httpx.post(url + "/api/v1/retrieve_future", json={"request_id": created["request_id"]}, timeout=30)
    return str(created["model_id"])


def train(client: Client, model_id: str) -> float:
    loss = client.forward_backward(model_id, ROWS)["loss"]
    client.optim_step(model_id, learning_rate=0.05)
    return float(loss)


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL], ids=["term", "hangup", "kill"])
@pytest.mark.parametrize("snapshot_after_s", [0.0, 1e9], ids=["snapshots", "replay"])
def test_training_goes_on_where_it_was(
    process: Process, config: ServiceConfig, ending: signal.Signals, snapshot_after_s: float
) -> None:
    alone = start(config, toy_backend())
    with Client(alone.url) as client:
        model = create(alone.url, seed=5)
        expected = [train(client, model) for _ in range(3)]
        client.forward_backward(model, ROWS)
        expected += [train(client, model), train(client, model)]
    alone.stop()

    params = {"max_tokens": 8, "seed": 1}
    process.snapshot_after_s = snapshot_after_s
    process.start()
    client = process.client
    client.list_lora_adapters()  # waits until it is there
    model = create(process.url, seed=5)
    seen = [train(client, model) for _ in range(3)]
    pinned = client.sample(["abc"], model_id=model, sampling_params=params)
    assert pinned["model_id"] == f"{model}@3"
    client.forward_backward(model, ROWS)  # accumulated, its step comes after the restart
    assert process.end(ending) == (-signal.SIGKILL if ending == signal.SIGKILL else 0)
    process.start()
    seen += [train(client, model), train(client, model)]
    assert seen == expected
    assert client.sample(["abc"], model_id=f"{model}@3", sampling_params=params) == pinned


def test_versions_whose_files_a_kill_took_come_back(process: Process) -> None:
    process.start()
    client = process.client
    client.list_lora_adapters()  # waits until it is there
    simple, plain = str(client.add_lora(rank=2)["model_id"]), create(process.url, seed=4)
    for _ in range(2):
        train(client, simple)
        train(client, plain)
    params = {"max_tokens": 8, "seed": 1}
    names = [f"{simple}@1", f"{simple}@2"]
    asked = [client.sample(["abc"], model_id=name, sampling_params=params) for name in names]
    saved = process.post("/api/v1/save_weights_for_sampler", model_id=plain, seq_id=5, sampling_session_seq_id=7)
    session = process.outcome(saved["request_id"]).json()["sampling_session_id"]
    sample = {"sampling_session_id": session, "prompt": {"chunks": [{"tokens": [65]}]}, "sampling_params": params}

    def drawn(seq_id: int) -> Any:
        return process.outcome(process.post("/api/v1/asample", seq_id=seq_id, **sample)["request_id"]).content

    before = drawn(0)
    process.end(signal.SIGKILL)
    for folder in (process.data_dir / "adapters").glob("*/version-*"):
        shutil.rmtree(folder)
    process.start()
    client.list_lora_adapters()
    assert [client.sample(["abc"], model_id=name, sampling_params=params) for name in names] == asked
    assert drawn(1) == before


def test_what_was_accepted_runs_after_a_kill_under_its_request_id(process: Process) -> None:
    process.seconds_per_call = 30.0
    process.start()
    process.client.list_lora_adapters()  # waits until it is there
    session = process.post("/api/v1/create_session")["session_id"]
    model = process.post(
        "/api/v1/create_model", session_id=session, model_seq_id=0, lora_config={"rank": 2, "seed": 1}
    )["model_id"]
    sampler = process.post("/api/v1/create_sampling_session", session_id=session, sampling_session_seq_id=0)[
        "sampling_session_id"
    ]
    body = {"model_id": model, "data": [{"input_ids": [65], "target_tokens": [66]}]}
    with pytest.raises(httpx.ReadTimeout):  # accepted, and then it takes 30 s
        httpx.post(process.url + "/forward_backward", json=body, timeout=1.0, headers={"Idempotency-Key": "one"})
    step = process.post("/api/v1/optim_step", model_id=model, seq_id=2, adam_params={"learning_rate": 0.1})
    prompt = {"chunks": [{"tokens": [65]}]}
    sample = {"sampling_session_id": sampler, "seq_id": 0, "prompt": prompt, "sampling_params": {"max_tokens": 2}}
    accepted = process.post("/api/v1/asample", **sample)
    process.end(signal.SIGKILL)

    process.seconds_per_call = 0.0
    process.start()
    process.client.list_lora_adapters()
    done = process.outcome(step["request_id"]).json()
    assert done["metrics"]["step:max"] == 1.0
    assert done["metrics"]["grad_norm:mean"] > 0.0, "the forward_backward before it was repeated"
    assert (
        process.post("/api/v1/optim_step", model_id=model, seq_id=2, adam_params={})["request_id"]
        == (step["request_id"])
    )
    assert process.post("/api/v1/asample", **sample) == accepted
    assert process.outcome(accepted["request_id"]).status_code == 200
    repeated = httpx.post(process.url + "/forward_backward", json=body, timeout=30, headers={"Idempotency-Key": "one"})
    assert repeated.status_code == 200
    assert process.outcome(step["request_id"]).json() == done


def test_a_kill_at_any_moment_loses_no_answered_step(process: Process, config: ServiceConfig) -> None:
    process.snapshot_after_s = 0.01
    process.start()
    client = process.client
    client.list_lora_adapters()
    model = create(process.url, seed=3)
    seen = []
    for turn in range(12):
        seen.append(train(client, model))
        if turn % 4 == 3:
            os.kill(process.process.pid if process.process else 0, signal.SIGKILL)
            assert process.process is not None
            process.process.wait()
            process.start()
            time.sleep(0.1)
    alone = start(config, toy_backend())
    with Client(alone.url) as other:
        same = create(alone.url, seed=3)
        assert seen == [train(other, same) for _ in range(12)]
    alone.stop()


def test_another_tensor_parallel_size_is_refused(config: ServiceConfig) -> None:
    start(config).stop()
    backend = toy_backend()
    object.__setattr__(backend, "tp_size", 2)
    with pytest.raises(ValueError, match="tensor_parallel_size=1, this run has tensor_parallel_size=2"):
        start(config, backend)
