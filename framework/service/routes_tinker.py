"""The tinker SDK's endpoints, ``/api/v1/*``: sessions, models, training, sampling, futures. Checkpoints: routes_rest.

What may be answered at once with a 4xx and what must go through a future follows from how the SDK reacts: a numbered
training request is never refused at once, because the SDK would not send that number again.
"""

from __future__ import annotations

import json
import time
import uuid
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from framework.service import wire
from framework.service.adapters import spec_from_json
from framework.service.http import caller_of, service_of
from framework.service.ops import CreateAdapter, Refuse, RequestError, Sample
from framework.service.requests import body_json, parse, parse_sample
from framework.service.service import Caller, Service

router = APIRouter(prefix="/api/v1", tags=["tinker"])
Who = Annotated[Caller, Depends(caller_of)]
Svc = Annotated[Service, Depends(service_of)]
Id = Annotated[str, Field(min_length=1, max_length=256)]


class Lenient(BaseModel):
    """Newer SDKs add fields; what is not known is ignored where it cannot change a result."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())


class CreateSession(Lenient):
    """Who is there."""

    tags: list[str] = []
    user_metadata: dict[str, Any] | None = None
    sdk_version: str = ""
    project_id: str | None = None
    display_name: str | None = None


class SessionBody(Lenient):
    """Of which session."""

    session_id: Id


class ModelBody(Lenient):
    """Of which model."""

    model_id: Id


class NumberedBody(Lenient):
    """A request of a model; everything else in it is checked when its turn comes."""

    model_id: Id
    seq_id: int = Field(ge=1, le=(1 << 53))


class CreateModel(Lenient):
    """The shape of a new model."""

    session_id: Id
    model_seq_id: int = Field(ge=0, le=(1 << 53))
    base_model: str | None = None
    user_metadata: dict[str, Any] | None = None
    lora_config: dict[str, Any] | None = None
    optimizer_config: dict[str, Any] | None = None


class LoadWeights(Lenient):
    """From which checkpoint into which model."""

    path: str
    optimizer: bool = False
    model_id: str | None = None
    seq_id: int | None = None
    session_id: str | None = None
    model_seq_id: int | None = Field(default=None, ge=0, le=(1 << 53))
    user_metadata: dict[str, Any] | None = None


class CreateSamplingSession(Lenient):
    """From what a new sampling client samples."""

    session_id: Id
    sampling_session_seq_id: int = Field(ge=0, le=(1 << 62))
    base_model: str | None = None
    model_path: str | None = None


class SampleBody(Lenient):
    """Of which sampling session; the rest is checked with the sample."""

    sampling_session_id: Id
    seq_id: int = Field(ge=0, le=(1 << 62))


class RetrieveFuture(Lenient):
    """Of which request."""

    request_id: Id


@router.post("/client/config")
@router.post("/client/dynamic_config")
async def client_config() -> dict[str, Any]:
    """The SDK's defaults are what this server wants."""
    return {}


@router.post("/telemetry")
async def telemetry() -> dict[str, str]:
    """Accepted and dropped: it holds stack traces of the client's."""
    return {"status": "accepted"}


@router.get("/healthz")
async def healthz() -> dict[str, str]:
    """The process answers."""
    return {"status": "ok"}


@router.get("/get_server_capabilities")
async def capabilities(svc: Svc, who: Who) -> dict[str, Any]:
    """The one base model of this server."""
    return {
        "supported_models": [
            {
                "model_name": svc.model.name,
                "max_context_length": svc.model.context_tokens,
                "trainable": True,
                "sampleable": True,
            }
        ]
    }


@router.post("/create_session")
async def create_session(body: CreateSession, svc: Svc, who: Who) -> dict[str, Any]:
    """A session groups models and samplers; its heartbeats keep them."""
    session_id, now = str(uuid.uuid4()), time.time()
    info = body.model_dump()
    row = {"session_id": session_id, "owner": who.owner, "info": info, "created": now, "last_seen": now}
    svc.store.insert("sessions", row)
    return {"type": "create_session", "session_id": session_id}


@router.post("/session_heartbeat")
async def session_heartbeat(body: SessionBody, svc: Svc, who: Who) -> Response:
    """The client is still there; 410 ends its heartbeats."""
    session = svc.own_session(body.session_id, who)
    if session["finished"] is not None:
        return JSONResponse({"detail": "the session is finished"}, status_code=410)
    svc.store.write("UPDATE sessions SET last_seen=? WHERE session_id=?", time.time(), body.session_id)
    return JSONResponse({"type": "session_heartbeat"})


@router.post("/sessions/{session_id}/finish", status_code=204)
async def finish_session(session_id: str, request: Request, svc: Svc, who: Who) -> Response:
    """Nothing more will come; the first reason counts."""
    svc.own_session(session_id, who)
    reason = (body_json(await request.body() or b"{}").get("reason") or {}).get("type", "success")
    svc.store.write(
        "UPDATE sessions SET finished=? WHERE session_id=? AND finished IS NULL", str(reason)[:64], session_id
    )
    return Response(status_code=204)


def _live_session(svc: Service, session_id: str, who: Caller) -> None:
    if svc.own_session(session_id, who)["finished"] is not None:
        raise RequestError(f"session {session_id} is finished", status=410)


@router.post("/create_model")
async def create_model(body: CreateModel, request: Request, svc: Svc, who: Who) -> dict[str, str]:
    """A new model named after its session and number; its future ends when it can be trained."""
    _live_session(svc, body.session_id, who)
    svc.model.check(body.base_model)
    payload = await request.body()
    op = parse("create_model", payload, svc.limits)
    assert isinstance(op, CreateAdapter)
    adapter_id = f"{body.session_id}:train:{body.model_seq_id}"
    request_id = svc.create_adapter(
        adapter_id=adapter_id, op=op, kind="create_model", payload=payload, owner=who.owner,
        session_id=body.session_id, info={"user_metadata": body.user_metadata},
    )  # fmt: skip
    return {"request_id": request_id, "model_id": adapter_id}


@router.post("/get_info")
async def get_info(body: ModelBody, svc: Svc, who: Who) -> dict[str, Any]:
    """What the SDK needs to know of a model."""
    row = svc.own_adapter(body.model_id, who)
    return {
        "type": "get_info",
        "model_id": body.model_id,
        "is_lora": True,
        "lora_rank": row["spec"]["rank"],
        "model_name": svc.model.name,
        "optimizer_config": {"type": "adamw"},
        "model_data": {
            "arch": svc.model.arch,
            "model_name": svc.model.name,
            "tokenizer_id": svc.model.tokenizer_id,
        },
        "lora_alpha": row["spec"]["alpha"],
        "lora_targets": row["spec"]["targets"],
    }


@router.post("/forward_backward")
async def forward_backward(request: Request, svc: Svc, who: Who) -> Response:
    """A protobuf ForwardBackwardRequest; ``forward_only`` in it makes it a forward."""
    if wire.PROTOBUF not in request.headers.get("content-type", ""):
        return JSONResponse({"detail": f"content-type must be {wire.PROTOBUF}"}, status_code=415)
    if request.headers.get("content-encoding", "identity") != "identity":
        return JSONResponse({"detail": "compressed bodies are not accepted; client/config says so"}, status_code=415)
    payload = await request.body()
    message = wire.parse_request(payload)
    return _accepted(svc, who, "forward_backward", message.model_id, message.seq_id, payload)


def _accepted(svc: Service, who: Caller, kind: str, model_id: str, seq: int, payload: bytes) -> Response:
    request_id = svc.train(kind=kind, adapter_id=model_id, seq=seq, payload=payload, caller=who)
    return JSONResponse({"request_id": request_id, "model_id": model_id})


@router.post("/optim_step")
async def optim_step(body: NumberedBody, request: Request, svc: Svc, who: Who) -> Response:
    """One AdamW step."""
    return _accepted(svc, who, "optim_step", body.model_id, body.seq_id, await request.body())


@router.post("/save_weights")
async def save_weights(body: NumberedBody, request: Request, svc: Svc, who: Who) -> Response:
    """A checkpoint to go on training from."""
    return _accepted(svc, who, "save_weights", body.model_id, body.seq_id, await request.body())


@router.post("/save_weights_for_sampler")
async def save_weights_for_sampler(body: NumberedBody, request: Request, svc: Svc, who: Who) -> Response:
    """A version to sample from, named or for one sampling client."""
    return _accepted(svc, who, "save_weights_for_sampler", body.model_id, body.seq_id, await request.body())


@router.post("/save_weights_external")
async def save_weights_external(body: NumberedBody, request: Request, svc: Svc, who: Who) -> Response:
    """A checkpoint to be downloaded as a PEFT adapter."""
    return _accepted(svc, who, "save_weights_external", body.model_id, body.seq_id, await request.body())


@router.post("/load_weights")
async def load_weights(body: LoadWeights, request: Request, svc: Svc, who: Who) -> Response:
    """Into an existing model, or with ``session_id`` into a new one of the checkpoint's shape."""
    payload = await request.body()
    if body.model_id is not None and body.seq_id is not None:
        return _accepted(svc, who, "load_weights", body.model_id, body.seq_id, payload)
    if body.session_id is None or body.model_seq_id is None:
        raise RequestError("model_id and seq_id, or session_id and model_seq_id, are required", status=422)
    _live_session(svc, body.session_id, who)
    checkpoint = svc.adapters.checkpoint(body.path, who.owner, kind="weights")
    source = svc.store.one("SELECT spec FROM adapters WHERE adapter_id=?", checkpoint["adapter_id"])
    assert source is not None, "adapters' rows outlive their checkpoints"
    op = CreateAdapter(spec=spec_from_json(source["spec"]), seed=0, source=body.path, optimizer=body.optimizer)
    adapter_id = f"{body.session_id}:train:{body.model_seq_id}"
    request_id = svc.create_adapter(
        adapter_id=adapter_id, op=op, kind="load_weights", payload=payload, owner=who.owner,
        session_id=body.session_id,
        info={"user_metadata": body.user_metadata, "source": body.path, "optimizer": body.optimizer},
    )  # fmt: skip
    return JSONResponse({"request_id": request_id, "model_id": adapter_id})


@router.post("/create_sampling_session")
async def create_sampling_session(body: CreateSamplingSession, svc: Svc, who: Who) -> dict[str, str]:
    """A sampling client of the base model or of a named version."""
    _live_session(svc, body.session_id, who)
    sampler_id = f"{body.session_id}:sample:{body.sampling_session_seq_id}"
    row: dict[str, Any] = {"sampler_id": sampler_id, "session_id": body.session_id, "owner": who.owner}
    if body.model_path is not None:
        found = svc.adapters.checkpoint(body.model_path, who.owner, kind="sampler_weights")
        row |= {"model_path": body.model_path, "adapter_id": found["adapter_id"], "version": found["version"]}
    else:
        svc.model.check(body.base_model)
    svc.store.insert("samplers", {**row, "created": time.time()}, replace=True)
    return {"type": "create_sampling_session", "sampling_session_id": sampler_id}


@router.get("/samplers/{sampler_id}")
async def get_sampler(sampler_id: str, svc: Svc, who: Who) -> dict[str, Any]:
    """What a sampling client samples from."""
    row, _ = svc.version_of_sampler(sampler_id, who)
    return {"sampler_id": sampler_id, "base_model": svc.model.name, "model_path": row["model_path"]}


@router.post("/asample")
async def asample(body: SampleBody, request: Request, svc: Svc, who: Who) -> dict[str, Any]:
    """Samples; what is wrong with a request is told by its future."""
    sampler, version = svc.version_of_sampler(body.sampling_session_id, who)
    payload = await request.body()
    request_id = f"{body.sampling_session_id}:{body.seq_id}"
    raw = body_json(payload)
    tenant = svc.tenant(sampler["owner"], sampler["session_id"])
    op: Sample | Refuse
    try:
        op = parse_sample(raw, version, svc.limits)
        count = op.num_samples
    except RequestError as error:  # the SDK expects what is wrong with a sample in its future
        op, count = Refuse(message=str(error)), 1
    svc.sample(
        op=op, kind="sample", payload=payload, owner=who.owner, tenant=tenant, dedupe=request_id,
        request_id=request_id,
    )  # fmt: skip
    return {"request_id": request_id, "sample_sequence_ids": [f"{request_id}:{index}" for index in range(count)]}


@router.post("/retrieve_future")
async def retrieve_future(body: RetrieveFuture, svc: Svc, who: Who) -> Response:
    """Held until the outcome is there; 408 asks for another poll."""
    outcome = await svc.futures.wait(body.request_id, who.owner, svc.config.poll_s)
    if outcome is None:
        pending = {"type": "try_again", "request_id": body.request_id, "queue_state": "active"}
        return Response(json.dumps(pending), status_code=408, media_type=wire.JSON)
    return Response(outcome.body, media_type=outcome.content_type)


@router.post("/cancel_future", status_code=204)
async def cancel_future(body: RetrieveFuture, svc: Svc, who: Who) -> Response:
    """Stops sampling what nobody waits for."""
    waiting = svc.futures.pending.get(body.request_id)
    if waiting is not None and waiting[0] == who.owner:
        svc.cancel(body.request_id)
    return Response(status_code=204)
