"""API keys: hashed at rest, each with an owner. In local mode there is one user and no key is asked for."""

from __future__ import annotations

import hashlib
import secrets
import time
from dataclasses import dataclass
from typing import Literal

from framework.service.ops import RequestError
from framework.service.service import Caller
from framework.service.store import Store

PREFIX = "tml-"
"""The SDK refuses keys that begin otherwise."""
MIN_LENGTH = 24
LOCAL = Caller(owner="local", admin=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Keys:
    """The registry's keys. A key is 192 random bits, so one round of SHA-256 is enough to keep it from being read."""

    store: Store
    auth: Literal["local", "keys"]

    def caller(self, key: str | None) -> Caller:
        """Whose key it is.

        Raises:
            RequestError: 401 for none, 403 for an unknown one.
        """
        if self.auth == "local":
            return LOCAL
        if key is None:
            raise RequestError("an API key is required: X-API-Key or Authorization: Bearer", status=401)
        row = self.store.one("SELECT owner, admin FROM api_keys WHERE key_hash=?", _digest(key))
        if row is None:
            raise RequestError("this API key is not known", status=403)
        return Caller(owner=row["owner"], admin=bool(row["admin"]))

    def create(self, owner: str, *, admin: bool = False) -> str:
        """Makes a key; it is told once and cannot be read again."""
        key = PREFIX + secrets.token_urlsafe(24)
        self.add(key, owner, admin=admin)
        return key

    def add(self, key: str, owner: str, *, admin: bool) -> None:
        """Registers a key chosen elsewhere.

        Raises:
            RequestError: it is too short, or does not begin as the SDK demands.
        """
        if not key.startswith(PREFIX) or len(key) < MIN_LENGTH:
            raise RequestError(f"a key must begin with {PREFIX!r} and have at least {MIN_LENGTH} characters")
        row = {"key_hash": _digest(key), "owner": owner, "admin": int(admin), "created": time.time()}
        self.store.insert("api_keys", row, replace=True)

    def any(self) -> bool:
        """Whether there is a key at all."""
        return self.store.one("SELECT 1 FROM api_keys LIMIT 1") is not None

    def revoke(self, key_hash: str) -> bool:
        """Forgets a key; False if there is none with this hash."""
        return bool(self.store.write("DELETE FROM api_keys WHERE key_hash=?", key_hash))


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
