"""After a restart: queues as they were, with what was acknowledged since each adapter's snapshot to be done again.

A request that had ended only rebuilds the state (its outcome is in the registry); one that had not runs as if it had
just come, under the same request id, and its client's poll finds it.
"""

from __future__ import annotations

import logging
from typing import Any

from framework.service.adapters import spec_from_json
from framework.service.board import Board, Sampling
from framework.service.futures import Futures
from framework.service.ops import AdapterOp, CreateAdapter, Refuse, RequestError, Sample
from framework.service.replies import failure_reply
from framework.service.requests import RequestLimits, body_json, parse, parse_sample
from framework.service.scheduler import Entry

log = logging.getLogger(__name__)
REPEATED = ("create_model", "forward_backward", "optim_step", "load_weights", "save_weights_for_sampler")
"""Endings of the kinds that a replay repeats: the first four change an adapter, the last one's file may be lost."""


def recover(board: Board, futures: Futures, limits: RequestLimits) -> tuple[int, int]:
    """Fills the queues from the registry, before anything runs.

    Returns:
        How many requests are repeated for their effect, and how many are pending.
    """
    repeated = pending = 0
    for row in board.store.all("SELECT * FROM adapters WHERE removed=0"):
        queue = board.scheduler.queue(row["adapter_id"], row["tenant"])
        queue.next_seq = row["snapshot_seq"] + 1
        requests = board.store.all(
            "SELECT * FROM requests WHERE adapter_id=? AND seq>? ORDER BY seq", row["adapter_id"], row["snapshot_seq"]
        )
        for request in requests:
            if request["status"] == "pending":
                board.scheduler.add(_entry(request, row, limits, replay=False), 0.0)
                futures.open(request["request_id"], request["owner"], request["tenant"])
                pending += 1
                continue
            queue.next_seq = request["seq"] + 1
            if request["status"] == "done" and request["kind"].endswith(REPEATED):
                board.scheduler.tenant(row["tenant"])
                queue.ready.append(_entry(request, row, limits, replay=True))
                repeated += 1
    for request in board.store.all("SELECT * FROM requests WHERE adapter_id IS NULL AND status='pending'"):
        pending += _sample(board, futures, limits, request)
    return repeated, pending


def _entry(request: dict[str, Any], adapter: dict[str, Any], limits: RequestLimits, *, replay: bool) -> Entry:
    op: AdapterOp
    try:
        op = _creation(request, adapter) if request["seq"] == 0 else parse(request["kind"], request["payload"], limits)
    except RequestError as error:
        op = Refuse(message=str(error))
    return Entry(
        request_id=request["request_id"],
        kind=request["kind"],
        tenant=adapter["tenant"],
        op=op,
        adapter_id=adapter["adapter_id"],
        seq=request["seq"],
        replay=replay,
    )


def _creation(request: dict[str, Any], adapter: dict[str, Any]) -> CreateAdapter:
    return CreateAdapter(
        spec=spec_from_json(adapter["spec"]),
        seed=adapter["seed"],
        source=adapter["info"].get("source"),
        optimizer=bool(adapter["info"].get("optimizer")),
    )


def _sample(board: Board, futures: Futures, limits: RequestLimits, request: dict[str, Any]) -> int:
    """Queues a sample again; 0 if it cannot be, which its future then tells."""
    try:
        body = body_json(request["payload"])
        sampler = board.store.one("SELECT * FROM samplers WHERE sampler_id=?", body.get("sampling_session_id"))
        if sampler is None:
            raise RequestError("its sampling session is gone")
        version = None if sampler["adapter_id"] is None else (sampler["adapter_id"], sampler["version"])
        op: Sample = parse_sample(body, version, limits)
    except RequestError as error:
        outcome = failure_reply(str(error), "server")
        board.store.finish([(request["request_id"], outcome.body, outcome.content_type, True)])
        return 0
    futures.open(request["request_id"], request["owner"], request["tenant"])
    entry = Entry(request_id=request["request_id"], kind=request["kind"], tenant=request["tenant"], op=op)
    board.scheduler.add(entry, 0.0)
    board.sampling[entry.request_id] = Sampling(entry=entry)
    return 1
