"""Service: what the HTTP routes call. It checks, writes down, queues, and waits for outcomes. Lives on the event loop.

The loop that executes (:mod:`framework.service.executor`) runs on the main thread; the two meet in ``leader.inbox``
and in :meth:`Service.deliver`.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from framework.service.adapters import Adapters, spec_to_json
from framework.service.futures import Futures
from framework.service.leader import Cancel, Message
from framework.service.metrics import Metrics
from framework.service.ops import AdapterOp, CreateAdapter, Outcome, Refuse, RequestError, Sample
from framework.service.plan import VersionKey
from framework.service.replies import failure_reply
from framework.service.requests import RequestLimits, parse
from framework.service.scheduler import Entry
from framework.service.settings import ServiceConfig
from framework.service.store import Store


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """The base model as clients know it."""

    name: str
    aliases: tuple[str, ...]
    arch: str
    tokenizer_id: str
    context_tokens: int
    tokenizer: Any
    """A transformers tokenizer."""

    def check(self, name: str | None) -> None:
        """Raises RequestError if ``name`` is not the base model's (None is)."""
        if name is not None and name not in (self.name, *self.aliases):
            raise RequestError(f"base model {name!r} is not served here; this server has {self.name!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Who sent a request."""

    owner: str
    admin: bool = False


@dataclass(slots=True, kw_only=True)
class Service:
    """One per process, on rank 0."""

    config: ServiceConfig
    model: Model
    limits: RequestLimits
    store: Store
    adapters: Adapters
    futures: Futures
    keys: Any
    """:class:`framework.service.keys.Keys`."""
    rates: Any
    """:class:`framework.service.http.Rates`."""
    metrics: Metrics
    post: Any
    """``leader.inbox.put``."""
    loop: asyncio.AbstractEventLoop | None = None
    streams: dict[str, asyncio.Queue[tuple[int, tuple[int, ...]] | None]] = field(default_factory=dict)
    stopping: bool = False
    started: float = field(default_factory=time.time)

    # ---- called by the executor's thread

    def deliver(self, outcomes: list[tuple[str, Outcome]]) -> None:
        """Hands outcomes that are in the registry to the event loop."""
        if self.loop is not None and not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self._resolve, outcomes)

    def stream(self, request_id: str, index: int, tokens: tuple[int, ...]) -> None:
        """Hands new tokens of a streaming sample to the event loop."""
        if self.loop is not None and not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self._stream, request_id, (index, tokens))

    def _resolve(self, outcomes: list[tuple[str, Outcome]]) -> None:
        self.futures.resolve(outcomes)
        for request_id, _ in outcomes:
            self._stream(request_id, None)

    def _stream(self, request_id: str, item: tuple[int, tuple[int, ...]] | None) -> None:
        if request_id in self.streams:
            self.streams[request_id].put_nowait(item)

    # ---- called by routes

    def create_adapter(
        self,
        *,
        adapter_id: str,
        op: CreateAdapter,
        kind: str,
        payload: bytes,
        owner: str,
        session_id: str | None,
        info: dict[str, Any],
    ) -> str:
        """Registers an adapter and queues its creation; the same id again is the same request."""
        tenant = self.tenant(owner, session_id or adapter_id)
        dedupe = f"create:{adapter_id}"
        known = self.store.one("SELECT request_id FROM requests WHERE dedupe=?", dedupe)
        if known is not None:
            return str(known["request_id"])
        count = self.store.one("SELECT COUNT(*) AS n FROM adapters WHERE owner=? AND removed=0", owner)
        if count is not None and count["n"] >= self.config.max_adapters_per_owner:
            raise RequestError(
                f"you have {count['n']} models, the limit is service.max_adapters_per_owner="
                f"{self.config.max_adapters_per_owner}; remove some"
            )
        now = time.time()
        with self.store.transaction():
            self.store.insert(
                "adapters",
                {
                    "adapter_id": adapter_id, "owner": owner, "tenant": tenant, "session_id": session_id,
                    "spec": spec_to_json(op.spec), "info": info, "created": now, "last_used": now, "seed": op.seed,
                },
            )  # fmt: skip
            request_id = self._accept(
                kind=kind, owner=owner, tenant=tenant, payload=payload, dedupe=dedupe, adapter_id=adapter_id, seq=0
            )
        self._enqueue(request_id, kind, owner, tenant, op, adapter_id, 0)
        return request_id

    def train(
        self,
        *,
        kind: str,
        adapter_id: str,
        seq: int | None,
        payload: bytes,
        caller: Caller,
        dedupe: str | None = None,
        op: AdapterOp | None = None,
    ) -> str:
        """Queues a request of an adapter. What is wrong with it is told by its future, in its turn.

        Args:
            kind: names the parser and the reply.
            adapter_id: must be the caller's.
            seq: the client's number, or None to take the next.
            payload: the body, kept for a replay.
            caller: who asks.
            dedupe: of a request without a number; with one it is (adapter, number).
            op: already parsed, else parsed here.
        """
        row = self.own_adapter(adapter_id, caller)
        if self.stopping:
            raise RequestError("the server is stopping; try again", status=503)
        if seq is None:
            last = self.store.one("SELECT MAX(seq) AS seq FROM requests WHERE adapter_id=?", adapter_id)
            seq = max(int((last or {}).get("seq") or 0), row["snapshot_seq"]) + 1
            key = None if dedupe is None else f"key:{adapter_id}:{dedupe}"
        else:
            key = f"seq:{adapter_id}:{seq}"
        if key is not None:
            known = self.store.one("SELECT request_id FROM requests WHERE dedupe=?", key)
            if known is not None:
                return str(known["request_id"])
        self._check_queue(row["tenant"])
        if op is None:
            try:
                op = parse(kind, payload, self.limits)
            except RequestError as error:
                op = Refuse(message=str(error))
        request_id = self._accept(
            kind=kind, owner=row["owner"], tenant=row["tenant"], payload=payload, dedupe=key,
            adapter_id=adapter_id, seq=seq,
        )  # fmt: skip
        self._enqueue(request_id, kind, row["owner"], row["tenant"], op, adapter_id, seq)
        return request_id

    def sample(
        self,
        *,
        op: Sample | Refuse,
        kind: str,
        payload: bytes,
        owner: str,
        tenant: str,
        dedupe: str | None,
        request_id: str,
    ) -> str:
        """Queues a sample under a given request id; a Refuse ends at once."""
        if self.stopping:
            raise RequestError("the server is stopping; try again", status=503)
        if dedupe is not None:
            known = self.store.one("SELECT request_id FROM requests WHERE dedupe=?", dedupe)
            if known is not None:
                return str(known["request_id"])
        self._check_queue(tenant)
        accepted = self._accept(
            kind=kind, owner=owner, tenant=tenant, payload=payload, dedupe=dedupe, request_id=request_id
        )
        if isinstance(op, Refuse):
            outcome = failure_reply(op.message, op.category)
            self.store.finish([(accepted, outcome.body, outcome.content_type, True)])
        else:
            self._enqueue(accepted, kind, owner, tenant, op, None, None)
        return accepted

    def cancel(self, request_id: str) -> None:
        """Nobody waits for this sample any more."""
        self.post(Cancel(request_id=request_id))

    async def wait(self, request_id: str, owner: str) -> Outcome:
        """The outcome of a request, however long it takes."""
        while True:
            outcome = await self.futures.wait(request_id, owner, 3600.0)
            if outcome is not None:
                return outcome

    async def tokens(self, request_id: str) -> AsyncIterator[tuple[int, tuple[int, ...]]]:
        """(sample index, new tokens) of a streaming sample until it ends."""
        queue = self.streams[request_id]
        while (item := await queue.get()) is not None:
            yield item

    def own_adapter(self, adapter_id: str, caller: Caller) -> dict[str, Any]:
        """The registry's row of an adapter of the caller's.

        Raises:
            RequestError: unknown, removed or another owner's: 404 in every case.
        """
        row = self.store.one("SELECT * FROM adapters WHERE adapter_id=?", adapter_id)
        if row is None or row["removed"] or not (row["owner"] == caller.owner or caller.admin):
            raise RequestError(f"there is no model {adapter_id!r}", status=404)
        return row

    def own_session(self, session_id: str, caller: Caller) -> dict[str, Any]:
        """Likewise for a session."""
        row = self.store.one("SELECT * FROM sessions WHERE session_id=?", session_id)
        if row is None or not (row["owner"] == caller.owner or caller.admin):
            raise RequestError(f"there is no session {session_id!r}", status=404)
        return row

    def tenant(self, owner: str, group: str) -> str:
        """Who shares the machine with whom: owners where there are keys, else sessions and single adapters."""
        return owner if self.config.auth == "keys" else group

    def _check_queue(self, tenant: str) -> None:
        waiting = self.futures.waiting[tenant]
        if waiting >= self.config.max_pending_per_tenant:
            raise RequestError(
                f"{waiting} requests of yours are waiting, the limit is service.max_pending_per_tenant="
                f"{self.config.max_pending_per_tenant}; send more when some are done",
                status=429,
            )

    def _accept(
        self,
        *,
        kind: str,
        owner: str,
        tenant: str,
        payload: bytes,
        dedupe: str | None,
        adapter_id: str | None = None,
        seq: int | None = None,
        request_id: str | None = None,
    ) -> str:
        return self.store.accept(
            request_id=request_id or str(uuid.uuid4()),
            owner=owner, tenant=tenant, kind=kind, dedupe=dedupe, payload=payload, adapter_id=adapter_id, seq=seq,
        )  # fmt: skip

    def _enqueue(
        self,
        request_id: str,
        kind: str,
        owner: str,
        tenant: str,
        op: AdapterOp | Sample,
        adapter_id: str | None,
        seq: int | None,
    ) -> None:
        self.futures.open(request_id, owner, tenant)
        message: Message = Entry(
            request_id=request_id, kind=kind, tenant=tenant, op=op, adapter_id=adapter_id, seq=seq
        )
        self.post(message)

    def version_of_sampler(self, sampler_id: str, caller: Caller) -> tuple[dict[str, Any], VersionKey | None]:
        """The registry's row of a sampling session of the caller's, and the version it is pinned to."""
        row = self.store.one("SELECT * FROM samplers WHERE sampler_id=?", sampler_id)
        if row is None or not (row["owner"] == caller.owner or caller.admin):
            raise RequestError(f"there is no sampling session {sampler_id!r}", status=404)
        return row, None if row["adapter_id"] is None else (row["adapter_id"], row["version"])
