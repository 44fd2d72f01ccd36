"""API keys over HTTP, for admins. The first admin key comes from the environment (``service.admin_key_variable``)."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Response
from pydantic import Field

from framework.service.ops import RequestError
from framework.service.routes_simple import Name, Strict
from framework.service.routes_tinker import Svc, Who
from framework.service.service import Caller

router = APIRouter(prefix="/admin/keys", tags=["admin"])


class NewKey(Strict):
    """Whose key, and whether it may make others."""

    owner: Name
    admin: bool = Field(default=False)


def _admin(who: Caller) -> None:
    if not who.admin:
        raise RequestError("this needs an admin's key", status=403)


@router.post("")
async def create_key(body: NewKey, svc: Svc, who: Who) -> dict[str, Any]:
    """A new key; it is told here and never again."""
    _admin(who)
    return {"owner": body.owner, "admin": body.admin, "key": svc.keys.create(body.owner, admin=body.admin)}


@router.get("")
async def list_keys(svc: Svc, who: Who) -> dict[str, Any]:
    """Owners and the hashes by which keys are revoked."""
    _admin(who)
    return {"keys": svc.store.all("SELECT key_hash, owner, admin, created FROM api_keys ORDER BY created")}


@router.delete("/{key_hash}", status_code=204)
async def revoke_key(key_hash: str, svc: Svc, who: Who) -> Response:
    """Takes effect at once."""
    _admin(who)
    if not svc.keys.revoke(key_hash):
        raise RequestError("there is no key with this hash", status=404)
    return Response(status_code=204)
