"""What grows is cut back: old versions, expired checkpoints and sessions, outcomes nobody fetches. Rank 0's loop."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

from framework.service.board import Board
from framework.service.ops import Sample
from framework.service.plan import VersionKey
from framework.service.store import Store

WRITTEN_AFTER_S = 60.0
"""A version's folder is there by then; removed before, it would come back."""


def sweep(board: Board) -> None:
    """One round; cheap when there is nothing to do."""
    now = time.time()
    store, config = board.store, board.config
    store.write(
        "UPDATE sessions SET finished='expired' WHERE finished IS NULL AND last_seen<?", now - config.session_timeout_s
    )
    for row in store.all("SELECT * FROM checkpoints WHERE expires IS NOT NULL AND expires<?", now):
        delete_checkpoint(board.store, row)
    store.write(
        "DELETE FROM samplers WHERE session_id IN (SELECT session_id FROM sessions WHERE finished IS NOT NULL "
        "AND last_seen<?)",
        now - config.outcome_ttl_s,
    )
    store.sweep(older_than_s=config.outcome_ttl_s)
    for key in _unneeded_versions(board, created_before=now - WRITTEN_AFTER_S):
        shutil.rmtree(board.adapters.paths.version(key), ignore_errors=True)
        store.write("DELETE FROM versions WHERE adapter_id=? AND version=?", *key)


def delete_checkpoint(store: Store, row: dict[str, Any]) -> None:
    """Forgets a checkpoint; a sampler's files belong to its version and go when nothing pins that."""
    store.write("DELETE FROM checkpoints WHERE path=?", row["path"])
    if row["kind"] != "sampler_weights":
        shutil.rmtree(Path(row["info"]["folder"]), ignore_errors=True)


def _unneeded_versions(board: Board, *, created_before: float) -> list[VersionKey]:
    """Versions that are not among the newest of a living adapter and that no checkpoint, sampler or sample pins."""
    rows = board.store.all(
        "SELECT adapter_id, version FROM versions AS v WHERE created<? AND "
        "NOT EXISTS (SELECT 1 FROM checkpoints c WHERE c.kind='sampler_weights' AND c.adapter_id=v.adapter_id "
        "            AND c.version=v.version) AND "
        "NOT EXISTS (SELECT 1 FROM samplers s WHERE s.adapter_id=v.adapter_id AND s.version=v.version) AND "
        "((SELECT removed FROM adapters a WHERE a.adapter_id=v.adapter_id)=1 OR "
        " (SELECT COUNT(*) FROM versions w WHERE w.adapter_id=v.adapter_id AND w.version>v.version)>=?)",
        created_before,
        board.config.keep_versions,
    )
    queued = {
        part.entry.op.version
        for tenant in board.scheduler.tenants.values()
        for part in tenant.samples
        if isinstance(part.entry.op, Sample)
    }
    keys = [(row["adapter_id"], row["version"]) for row in rows]
    return [key for key in keys if key not in queued and not board.engine_slots.users[key]]
