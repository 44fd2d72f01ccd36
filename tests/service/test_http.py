"""Keys and owners, limits and errors, over HTTP."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from framework.errors import ConfigError
from framework.service.http import Rates
from framework.service.ops import RequestError
from framework.service.settings import ServiceConfig
from tests.service.server import Running, start

ADMIN = "tml-" + "a" * 32


@pytest.fixture
def guarded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    monkeypatch.setenv("TANDEM_ADMIN_KEY", ADMIN)
    server = start(ServiceConfig(port=0, data_dir=str(tmp_path / "data"), auth="keys", poll_s=1.0, max_body_mib=1))
    yield server
    server.stop()


def key_of(server: Running, owner: str) -> dict[str, str]:
    made = server.call("POST", "/admin/keys", {"owner": owner}, **{"X-API-Key": ADMIN})
    return {"X-API-Key": made.json()["key"]}


def test_keys_are_asked_for_hashed_and_revocable(guarded: Running) -> None:
    assert guarded.call("GET", "/v1/models").status_code == 401
    assert guarded.call("GET", "/v1/models", **{"X-API-Key": "tml-wrong"}).status_code == 403
    alice = key_of(guarded, "alice")
    bearer = {"Authorization": f"Bearer {alice['X-API-Key']}"}
    assert guarded.call("GET", "/v1/models", **bearer).status_code == 200
    assert guarded.call("POST", "/admin/keys", {"owner": "eve"}, **alice).status_code == 403
    path = Path(guarded.service.config.data_dir) / "registry.sqlite3"
    with sqlite3.connect(path) as database:
        text = "\n".join(database.iterdump())
    assert alice["X-API-Key"] not in text
    assert ADMIN not in text
    listed = guarded.call("GET", "/admin/keys", **{"X-API-Key": ADMIN}).json()["keys"]
    digest = next(row["key_hash"] for row in listed if row["owner"] == "alice")
    assert guarded.call("DELETE", f"/admin/keys/{digest}", **{"X-API-Key": ADMIN}).status_code == 204
    assert guarded.call("GET", "/v1/models", **alice).status_code == 403


def test_another_owners_things_do_not_exist(guarded: Running) -> None:
    alice, eve = key_of(guarded, "alice"), key_of(guarded, "eve")
    session = guarded.call("POST", "/api/v1/create_session", {}, **alice).json()["session_id"]
    made = guarded.call(
        "POST", "/api/v1/create_model", {"session_id": session, "model_seq_id": 0, "lora_config": {"rank": 2}}, **alice
    ).json()
    model = made["model_id"]
    save = {"model_id": model, "seq_id": 1, "path": "mine"}
    saved = guarded.call("POST", "/api/v1/save_weights", save, **alice).json()["request_id"]
    while guarded.call("POST", "/api/v1/retrieve_future", {"request_id": saved}, **alice).status_code == 408:
        pass
    guarded.call(
        "POST", "/api/v1/create_sampling_session", {"session_id": session, "sampling_session_seq_id": 0}, **alice
    )
    path = f"tinker://{model}/weights/mine"
    attempts: list[tuple[str, str, Any]] = [
        ("POST", "/api/v1/get_info", {"model_id": model}),
        ("POST", "/api/v1/optim_step", {"model_id": model, "seq_id": 2, "adam_params": {}}),
        ("POST", "/optim_step", {"model_id": model}),
        ("POST", "/sample", {"model_id": model, "prompts": ["a"]}),
        ("POST", "/v1/completions", {"model": model, "prompt": "a"}),
        ("POST", "/remove", {"model_id": model}),
        ("POST", "/api/v1/retrieve_future", {"request_id": saved}),
        ("POST", "/api/v1/weights_info", {"tinker_path": path}),
        ("POST", "/api/v1/load_weights", {"session_id": session, "model_seq_id": 1, "path": path}),
        ("GET", f"/api/v1/training_runs/{model}", None),
        ("DELETE", f"/api/v1/training_runs/{model}/checkpoints/weights/mine", None),
        ("POST", f"/api/v1/training_runs/{model}/checkpoints/weights/mine/publish", None),
        ("GET", f"/api/v1/sessions/{session}", None),
        ("GET", f"/api/v1/samplers/{session}:sample:0", None),
        ("POST", "/api/v1/asample", {"sampling_session_id": f"{session}:sample:0", "seq_id": 0}),
    ]
    for method, url, body in attempts:
        answer = guarded.call(method, url, body, **eve)
        assert answer.status_code == 404, (url, answer.text)
    assert guarded.call("GET", "/list_lora_adapters", **eve).json() == {"adapters": []}
    assert guarded.call("GET", "/api/v1/checkpoints", **eve).json()["checkpoints"] == []
    assert len(guarded.call("GET", "/v1/models", **eve).json()["data"]) == 1
    publish = f"/api/v1/training_runs/{model}/checkpoints/weights/mine/publish"
    assert guarded.call("POST", publish, **alice).status_code == 204
    assert guarded.call("POST", "/api/v1/weights_info", {"tinker_path": path}, **eve).status_code == 200
    assert guarded.call("DELETE", publish.removesuffix("/publish"), **eve).status_code == 404


def test_keys_mode_without_any_key_does_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TANDEM_ADMIN_KEY", raising=False)
    with pytest.raises(ConfigError, match="TANDEM_ADMIN_KEY"):
        start(ServiceConfig(port=0, data_dir=str(tmp_path), auth="keys"))


def test_bodies_have_a_limit_and_the_server_goes_on(guarded: Running) -> None:
    headers = {"X-API-Key": ADMIN, "content-type": "application/json"}
    huge = httpx.post(guarded.url + "/sample", content=b"x" * (2 << 20), headers=headers)
    assert huge.status_code == 413
    assert "max_body_mib=1" in huge.json()["detail"]
    assert guarded.call("GET", "/healthz").json() == {"status": "ok"}


def test_queues_and_ranks_have_limits(running: Running) -> None:
    running.service.config.max_pending_per_tenant = 0
    full = running.call("POST", "/sample", {"prompts": ["a"]})
    assert full.status_code == 429
    assert full.headers["retry-after"] == "1"
    running.service.config.max_pending_per_tenant = 10
    rank = running.call("POST", "/add_lora", {"rank": 65})
    assert (rank.status_code, "at most 64" in rank.json()["detail"]) == (400, True)
    running.service.config.max_adapters_per_owner = 1
    assert running.call("POST", "/add_lora", {"rank": 1}).status_code == 200
    assert "max_adapters_per_owner=1" in running.call("POST", "/add_lora", {"rank": 1}).json()["detail"]


def test_a_stopping_server_refuses_new_work(running: Running) -> None:
    running.service.stopping = True
    assert running.call("GET", "/readyz").status_code == 503
    assert running.call("POST", "/sample", {"prompts": ["a"]}).status_code == 503


def test_a_foreign_host_name_is_refused_in_local_mode(running: Running) -> None:
    answer = httpx.get(running.url + "/healthz", headers={"host": "evil.example"})
    assert answer.status_code == 400


def test_metrics_request_ids_and_docs(running: Running) -> None:
    params = {"max_tokens": 3, "temperature": 0}
    sampled = running.call("POST", "/sample", {"prompts": ["a"], "sampling_params": params}).json()
    (completion,) = sampled["completions"][0]
    assert completion["stop_reason"] == "length"
    answer = running.call("GET", "/metrics", **{"X-Request-Id": "mine-7"})
    assert answer.headers["x-request-id"] == "mine-7"
    lines = dict(line.rsplit(" ", 1) for line in answer.text.splitlines() if line and not line.startswith("#"))
    assert float(lines["tandem_sampled_tokens_total"]) == 3.0
    assert float(lines["tandem_waiting"]) == 0.0
    assert running.call("GET", "/docs").status_code == 200
    assert "/api/v1/asample" in json.loads(running.call("GET", "/openapi.json").text)["paths"]


def test_a_bucket_refills_with_time() -> None:
    rates = Rates(per_s=2.0)
    rates.take("a")
    rates.take("a")
    with pytest.raises(RequestError, match="max_requests_per_s=2"):
        rates.take("a")
    rates.take("b")
    left, then = rates.buckets["a"]
    rates.buckets["a"] = (left, then - 1.0)
    rates.take("a")
    assert rates.buckets["a"][0] < 2.0
