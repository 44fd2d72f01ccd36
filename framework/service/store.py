"""The registry: one SQLite database (WAL) with everything that must outlive the process.

A request is written before it is acknowledged and its outcome before it is told, so kill -9 loses neither. The
tensors are in folders beside the database; rows point at them. One connection behind one lock: writers are the HTTP
thread and the executor, both short.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from framework.errors import CheckpointError

SCHEMA_VERSION = 1
_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS sessions (
  session_id TEXT PRIMARY KEY, owner TEXT NOT NULL, info TEXT NOT NULL, created REAL NOT NULL, last_seen REAL NOT NULL,
  finished TEXT);
CREATE TABLE IF NOT EXISTS adapters (
  adapter_id TEXT PRIMARY KEY, owner TEXT NOT NULL, tenant TEXT NOT NULL, session_id TEXT, spec TEXT NOT NULL,
  info TEXT NOT NULL, created REAL NOT NULL, last_used REAL NOT NULL, seed INTEGER NOT NULL,
  snapshot_seq INTEGER NOT NULL DEFAULT -1, snapshot TEXT, version INTEGER NOT NULL DEFAULT 0,
  removed INTEGER NOT NULL DEFAULT 0);
CREATE TABLE IF NOT EXISTS requests (
  request_id TEXT PRIMARY KEY, owner TEXT NOT NULL, tenant TEXT NOT NULL, kind TEXT NOT NULL, adapter_id TEXT,
  seq INTEGER, dedupe TEXT UNIQUE, payload BLOB, status TEXT NOT NULL, body BLOB, content_type TEXT,
  created REAL NOT NULL, finished REAL);
CREATE INDEX IF NOT EXISTS requests_by_adapter ON requests (adapter_id, seq);
CREATE INDEX IF NOT EXISTS requests_by_status ON requests (status, finished);
CREATE TABLE IF NOT EXISTS versions (
  adapter_id TEXT NOT NULL, version INTEGER NOT NULL, created REAL NOT NULL, PRIMARY KEY (adapter_id, version));
CREATE TABLE IF NOT EXISTS checkpoints (
  path TEXT PRIMARY KEY, adapter_id TEXT NOT NULL, kind TEXT NOT NULL, name TEXT NOT NULL, owner TEXT NOT NULL,
  info TEXT NOT NULL, version INTEGER, size INTEGER NOT NULL, public INTEGER NOT NULL DEFAULT 0,
  created REAL NOT NULL, expires REAL);
CREATE TABLE IF NOT EXISTS samplers (
  sampler_id TEXT PRIMARY KEY, session_id TEXT, owner TEXT NOT NULL, model_path TEXT, adapter_id TEXT,
  version INTEGER, created REAL NOT NULL);
CREATE TABLE IF NOT EXISTS api_keys (
  key_hash TEXT PRIMARY KEY, owner TEXT NOT NULL, admin INTEGER NOT NULL, created REAL NOT NULL);
"""
Row = Mapping[str, Any]


class Store:
    """Typed access to the registry. JSON columns (``info``, ``spec``) come back parsed."""

    def __init__(self, path: Path, *, facts: Mapping[str, str]) -> None:
        """Opens or creates the database.

        Args:
            path: of the database file.
            facts: what the tensors on disk depend on (model, tensor-parallel size); must not change between runs.

        Raises:
            CheckpointError: the directory was written with other facts.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.RLock()
        self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        self._db.row_factory = sqlite3.Row
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=NORMAL")
        self._db.executescript(_SCHEMA)
        for key, value in {"schema": str(SCHEMA_VERSION), **facts}.items():
            known = self.one("SELECT value FROM meta WHERE key=?", key)
            if known is None:
                self.write("INSERT INTO meta VALUES (?,?)", key, value)
            elif known["value"] != value:
                raise CheckpointError(
                    f"{path} was written with {key}={known['value']}, this run has {key}={value}; start it as before "
                    f"or give another service.data_dir"
                )

    def close(self) -> None:
        with self._lock:
            self._db.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Commits the writes of the block together, or none of them."""
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    def write(self, sql: str, *values: Any) -> int:
        """Runs one statement and returns how many rows it changed."""
        with self._lock:
            return self._db.execute(sql, values).rowcount

    def all(self, sql: str, *values: Any) -> list[dict[str, Any]]:
        with self._lock:
            rows = self._db.execute(sql, values).fetchall()
        return [_parsed(row) for row in rows]

    def one(self, sql: str, *values: Any) -> dict[str, Any] | None:
        with self._lock:
            row = self._db.execute(sql, values).fetchone()
        return None if row is None else _parsed(row)

    def accept(
        self,
        *,
        request_id: str,
        owner: str,
        tenant: str,
        kind: str,
        dedupe: str | None,
        payload: bytes,
        adapter_id: str | None = None,
        seq: int | None = None,
    ) -> str:
        """Writes a request down. The request id of the first one with this ``dedupe`` key is returned instead."""
        with self._lock:
            changed = self.write(
                "INSERT OR IGNORE INTO requests (request_id, owner, tenant, kind, adapter_id, seq, dedupe, payload, "
                "status, created) VALUES (?,?,?,?,?,?,?,?,'pending',?)",
                request_id, owner, tenant, kind, adapter_id, seq, dedupe, payload, time.time(),
            )  # fmt: skip
            if changed:
                return request_id
            known = self.one("SELECT request_id FROM requests WHERE dedupe=?", dedupe)
            assert known is not None, "an ignored insert means the dedupe key exists"
            return str(known["request_id"])

    def finish(self, outcomes: Sequence[tuple[str, bytes, str, bool]]) -> None:
        """Writes outcomes down: (request id, body, content type, failed)."""
        if not outcomes:
            return
        now = time.time()
        with self.transaction():
            for request_id, body, content_type, failed in outcomes:
                self.write(
                    "UPDATE requests SET status=?, body=?, content_type=?, finished=?, "
                    "payload=CASE WHEN adapter_id IS NULL THEN NULL ELSE payload END WHERE request_id=?",
                    "failed" if failed else "done", body, content_type, now, request_id,
                )  # fmt: skip

    def insert(self, table: str, row: Row, *, replace: bool = False) -> None:
        """Inserts a row; dicts and lists become JSON."""
        names = ", ".join(row)
        marks = ", ".join("?" for _ in row)
        values = [json.dumps(value) if isinstance(value, dict | list) else value for value in row.values()]
        self.write(f"INSERT OR {'REPLACE' if replace else 'ABORT'} INTO {table} ({names}) VALUES ({marks})", *values)

    def sweep(self, *, older_than_s: float) -> int:
        """Deletes the outcomes of finished requests that nothing needs any more; returns how many."""
        return self.write(
            "DELETE FROM requests WHERE status!='pending' AND finished<? AND payload IS NULL",
            time.time() - older_than_s,
        )

    def forget_payloads(self, adapter_id: str, seq: int) -> None:
        """The adapter's state up to ``seq`` is on disk: what was asked until then need not be repeated."""
        self.write("UPDATE requests SET payload=NULL WHERE adapter_id=? AND seq<=?", adapter_id, seq)


def _parsed(row: sqlite3.Row) -> dict[str, Any]:
    values: dict[str, Any] = dict(row)
    for key in ("info", "spec"):
        if isinstance(values.get(key), str):
            values[key] = json.loads(values[key])
    return values


def placeholders(values: Sequence[Any]) -> str:
    """``?,?,?`` for an SQL IN list."""
    return ",".join("?" for _ in values)
