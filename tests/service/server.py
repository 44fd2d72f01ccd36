"""A whole service on the toy backend, over real HTTP: loop on one thread, uvicorn on another."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from framework.service.executor import Executor
from framework.service.launch import Backend, HttpThread, build_service, build_worker
from framework.service.leader import Leader, Stop
from framework.service.service import Service
from framework.service.settings import ServiceConfig
from tests.service.toy_pair import toy_backend


@dataclass
class Running:
    """A service that runs until :meth:`stop` (as SIGTERM would) or :meth:`kill` (as kill -9 would)."""

    service: Service
    leader: Leader
    backend: Backend
    http: HttpThread
    loop: threading.Thread

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.port}"

    def stop(self) -> None:
        self.service.stopping = True
        self.leader.inbox.put(Stop())
        self.loop.join(timeout=30)
        assert not self.loop.is_alive(), "the loop did not stop"
        self.http.stop()
        self.service.store.close()

    def call(self, method: str, path: str, body: Any = None, **headers: str) -> httpx.Response:
        return httpx.request(method, self.url + path, json=body, headers=headers, timeout=30)


def start(config: ServiceConfig, backend: Backend | None = None) -> Running:
    """Starts a service; its registry and files are where ``config.data_dir`` says."""
    backend = backend or toy_backend()
    service, leader = build_service(config, backend)
    executor = Executor(worker=build_worker(config, backend, service.writer), mesh=backend.mesh, planner=leader)
    http = HttpThread(service)
    loop = threading.Thread(target=executor.run, name="loop", daemon=True)
    http.start()
    loop.start()
    return Running(service=service, leader=leader, backend=backend, http=http, loop=loop)


@pytest.fixture
def config(tmp_path: Path) -> ServiceConfig:
    """On a free port, polls short enough to be seen in a test."""
    return ServiceConfig(port=0, data_dir=str(tmp_path / "data"), poll_s=1.0)


@pytest.fixture
def running(config: ServiceConfig) -> Iterator[Running]:
    """A service on the toy backend."""
    server = start(config)
    yield server
    server.stop()
