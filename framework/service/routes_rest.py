"""The tinker SDK's RestClient: training runs, checkpoints, sessions. Lists are of the caller's own things."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import FileResponse

from framework.service.adapters import checkpoint_path
from framework.service.housekeeping import delete_checkpoint
from framework.service.ops import RequestError
from framework.service.requests import body_json, ttl_seconds
from framework.service.routes_tinker import Lenient, Svc, Who
from framework.service.service import Caller, Service
from framework.service.store import Store
from framework.service.worker import PEFT

router = APIRouter(prefix="/api/v1", tags=["tinker checkpoints"])
Limit = Annotated[int, Query(ge=0, le=1000)]
Offset = Annotated[int, Query(ge=0, le=1 << 40)]
Kind = Literal["weights", "sampler_weights", "external_weights"]
TYPES = {"weights": "training", "sampler_weights": "sampler", "external_weights": "external"}
LINK_S = 3600


class WeightsInfo(Lenient):
    """Of which checkpoint."""

    tinker_path: str


def _iso(seconds: float | None) -> str | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat()


def _checkpoint(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "checkpoint_id": f"{row['kind']}/{row['name']}",
        "checkpoint_type": TYPES[row["kind"]],
        "time": _iso(row["created"]),
        "tinker_path": row["path"],
        "size_bytes": row["size"],
        "public": bool(row["public"]),
        "user_metadata": row["info"].get("user_metadata"),
        "expires_at": _iso(row["expires"]),
    }


def _run(svc: Service, row: dict[str, Any]) -> dict[str, Any]:
    newest = "SELECT * FROM checkpoints WHERE adapter_id=? AND kind=? ORDER BY created DESC LIMIT 1"
    last = {kind: svc.store.one(newest, row["adapter_id"], kind) for kind in ("weights", "sampler_weights")}
    request = svc.store.one("SELECT MAX(created) AS t FROM requests WHERE adapter_id=?", row["adapter_id"])
    used = max(row["last_used"], (request or {}).get("t") or 0.0)
    return {
        "training_run_id": row["adapter_id"],
        "base_model": svc.model.name,
        "model_owner": row["owner"],
        "is_lora": True,
        "corrupted": False,
        "lora_rank": row["spec"]["rank"],
        "last_request_time": _iso(used),
        "last_checkpoint": None if last["weights"] is None else _checkpoint(last["weights"]),
        "last_sampler_checkpoint": None if last["sampler_weights"] is None else _checkpoint(last["sampler_weights"]),
        "user_metadata": row["info"].get("user_metadata"),
    }


def _page(svc: Service, sql: str, values: list[Any], limit: int, offset: int) -> tuple[list[Any], dict[str, int]]:
    """One page of a SELECT and the protocol's cursor."""
    total = svc.store.one(f"SELECT COUNT(*) AS n FROM ({sql})", *values)
    rows = svc.store.all(f"{sql} ORDER BY created DESC LIMIT ? OFFSET ?", *values, limit, offset)
    return rows, {"offset": offset, "limit": limit, "total_count": (total or {})["n"]}


@router.get("/training_runs")
async def training_runs(svc: Svc, who: Who, limit: Limit = 20, offset: Offset = 0) -> dict[str, Any]:
    """Models, the newest first."""
    rows, cursor = _page(svc, "SELECT * FROM adapters WHERE owner=?", [who.owner], limit, offset)
    return {"training_runs": [_run(svc, row) for row in rows], "cursor": cursor}


@router.get("/training_runs/{run_id}")
async def training_run(run_id: str, svc: Svc, who: Who) -> dict[str, Any]:
    """One model, also after it was removed."""
    return _run(svc, _owned_run(svc, run_id, who))


@router.get("/training_runs/{run_id}/checkpoints")
async def run_checkpoints(run_id: str, svc: Svc, who: Who, limit: Limit = 1000, offset: Offset = 0) -> dict[str, Any]:
    """One model's checkpoints, the newest first."""
    _owned_run(svc, run_id, who)
    rows, cursor = _page(svc, "SELECT * FROM checkpoints WHERE adapter_id=?", [run_id], limit, offset)
    return {"checkpoints": [_checkpoint(row) for row in rows], "cursor": cursor}


def _owned_run(svc: Service, run_id: str, who: Caller) -> dict[str, Any]:
    """Also of a model that was removed: its checkpoints are still there."""
    row = svc.store.one("SELECT * FROM adapters WHERE adapter_id=?", run_id)
    if row is None or not (row["owner"] == who.owner or who.admin):
        raise RequestError(f"there is no training run {run_id!r}", status=404)
    return row


@router.get("/checkpoints")
async def checkpoints(svc: Svc, who: Who, limit: Limit = 100, offset: Offset = 0) -> dict[str, Any]:
    """All the caller's checkpoints, the newest first."""
    rows, cursor = _page(svc, "SELECT * FROM checkpoints WHERE owner=?", [who.owner], limit, offset)
    return {"checkpoints": [_checkpoint(row) for row in rows], "cursor": cursor}


@router.post("/weights_info")
async def weights_info(body: WeightsInfo, svc: Svc, who: Who) -> dict[str, Any]:
    """What a new model must look like to load a checkpoint."""
    row = svc.adapters.readable_checkpoint(body.tinker_path, who.owner)
    adapter = svc.store.one("SELECT spec FROM adapters WHERE adapter_id=?", row["adapter_id"])
    assert adapter is not None, "adapters' rows outlive their checkpoints"
    targets = set(adapter["spec"]["targets"])
    return {
        "base_model": svc.model.name,
        "is_lora": True,
        "lora_rank": adapter["spec"]["rank"],
        "train_unembed": False,
        "train_mlp": "up_proj" in targets,
        "train_attn": "q_proj" in targets,
        "optimizer_config": {"type": "adamw"},
    }


def _owned_checkpoint(svc: Service, run_id: str, kind: str, name: str, who: Caller) -> dict[str, Any]:
    row = svc.store.one("SELECT * FROM checkpoints WHERE path=?", checkpoint_path(run_id, kind, name))
    if row is None or not (row["owner"] == who.owner or who.admin):
        raise RequestError(f"there is no checkpoint {checkpoint_path(run_id, kind, name)}", status=404)
    return row


@router.delete("/training_runs/{run_id}/checkpoints/{bare}")
async def delete_bare(run_id: str, bare: str, who: Who) -> Response:
    """A checkpoint's id has its kind in front."""
    raise RequestError(f"checkpoint id {bare!r} must be weights/NAME, sampler_weights/NAME or external_weights/NAME")


@router.delete("/training_runs/{run_id}/checkpoints/{kind}/{name}", status_code=204)
async def delete(run_id: str, kind: Kind, name: str, svc: Svc, who: Who) -> Response:
    """Forgets a checkpoint and its files."""
    delete_checkpoint(svc.store, _owned_checkpoint(svc, run_id, kind, name, who))
    return Response(status_code=204)


@router.post("/training_runs/{run_id}/checkpoints/{kind}/{name}/publish", status_code=204)
async def publish(run_id: str, kind: Kind, name: str, svc: Svc, who: Who) -> Response:
    """Lets every owner on this server read it."""
    row = _owned_checkpoint(svc, run_id, kind, name, who)
    svc.store.write("UPDATE checkpoints SET public=1 WHERE path=?", row["path"])
    return Response(status_code=204)


@router.delete("/training_runs/{run_id}/checkpoints/{kind}/{name}/publish", status_code=204)
async def unpublish(run_id: str, kind: Kind, name: str, svc: Svc, who: Who) -> Response:
    """Takes it back from the others."""
    row = _owned_checkpoint(svc, run_id, kind, name, who)
    svc.store.write("UPDATE checkpoints SET public=0 WHERE path=?", row["path"])
    return Response(status_code=204)


@router.put("/training_runs/{run_id}/checkpoints/{kind}/{name}/ttl", status_code=204)
async def set_ttl(run_id: str, kind: Kind, name: str, request: Request, svc: Svc, who: Who) -> Response:
    """From now on; null keeps it for ever."""
    row = _owned_checkpoint(svc, run_id, kind, name, who)
    ttl = ttl_seconds(body_json(await request.body()))
    expires = None if ttl is None else time.time() + ttl
    svc.store.write("UPDATE checkpoints SET expires=? WHERE path=?", expires, row["path"])
    return Response(status_code=204)


@router.get("/training_runs/{run_id}/checkpoints/external_weights/{name}/external_weights_urls")
async def external_urls(run_id: str, name: str, request: Request, svc: Svc, who: Who) -> dict[str, Any]:
    """Links to the PEFT files that need no key for an hour."""
    row = _owned_checkpoint(svc, run_id, "external_weights", name, who)
    expires = int(time.time()) + LINK_S
    urls = {}
    for file in sorted(_exported(row)):
        link = request.url_for("download", run_id=run_id, name=name, file=file.name)
        signature = _signature(svc.store, row["path"], file.name, expires)
        urls[file.name] = str(link.include_query_params(expires=expires, signature=signature))
    return {"urls": urls, "expires": _iso(expires)}


def _exported(row: dict[str, Any]) -> list[Path]:
    return list((Path(row["info"]["folder"]) / PEFT).iterdir())


@router.get("/download/{run_id}/{name}/{file}")
async def download(run_id: str, name: str, file: str, expires: int, signature: str, svc: Svc) -> Response:
    """A file of an exported checkpoint, by signed link."""
    path = checkpoint_path(run_id, "external_weights", name)
    expected = _signature(svc.store, path, file, expires)
    if expires < time.time() or not hmac.compare_digest(expected.encode(), signature.encode()):
        raise RequestError("this link is wrong or has expired", status=403)
    row = svc.store.one("SELECT info FROM checkpoints WHERE path=?", path)
    found = None if row is None else next((p for p in _exported(row) if p.name == file), None)
    if found is None:
        raise RequestError("the checkpoint was deleted", status=404)
    return FileResponse(found, filename=file)


def _signature(store: Store, path: str, file: str, expires: int) -> str:
    store.write("INSERT OR IGNORE INTO meta VALUES ('link_secret', ?)", secrets.token_hex(32))
    row = store.one("SELECT value FROM meta WHERE key='link_secret'")
    assert row is not None, "it was just made"
    return hmac.new(row["value"].encode(), f"{path}\n{file}\n{expires}".encode(), hashlib.sha256).hexdigest()


@router.get("/sessions")
async def sessions(svc: Svc, who: Who, limit: Limit = 20, offset: Offset = 0) -> dict[str, Any]:
    """Sessions, the newest first."""
    rows, _ = _page(svc, "SELECT * FROM sessions WHERE owner=?", [who.owner], limit, offset)
    return {"sessions": [row["session_id"] for row in rows]}


@router.get("/sessions/{session_id}")
async def session(session_id: str, svc: Svc, who: Who) -> dict[str, Any]:
    """What was made in a session."""
    row = svc.own_session(session_id, who)
    runs = svc.store.all("SELECT adapter_id FROM adapters WHERE session_id=? ORDER BY created", session_id)
    samplers = svc.store.all("SELECT sampler_id FROM samplers WHERE session_id=? ORDER BY created", session_id)
    return {
        "training_run_ids": [run["adapter_id"] for run in runs],
        "sampler_ids": [sampler["sampler_id"] for sampler in samplers],
        "user_metadata": row["info"].get("user_metadata"),
        "display_name": row["info"].get("display_name"),
    }
