"""Service: what the HTTP routes call. It checks, writes down, queues, and waits for outcomes. Lives on the event loop.

The loop that executes (:mod:`framework.service.executor`) runs on the main thread; the two meet in ``leader.inbox``
and in :meth:`Service.deliver`.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from framework.service.adapters import Adapters, spec_to_json
from framework.service.futures import Futures, Tokens
from framework.service.leader import BringFolders, Cancel, Message
from framework.service.metrics import Metrics
from framework.service.ops import AdapterOp, CreateAdapter, Outcome, Publish, Refuse, RequestError, Sample
from framework.service.plan import VersionKey
from framework.service.replies import failure_reply
from framework.service.requests import RequestLimits, parse
from framework.service.scheduler import Entry
from framework.service.settings import ServiceConfig
from framework.service.store import Store
from framework.service.writer import Writer
from framework.types import Completion


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Flow:
    """A streaming sample."""

    futures: Futures
    request_id: str
    owner: str

    def tokens(self) -> AsyncIterator[Tokens]:
        """(completion's index, new tokens) as they come."""
        return self.futures.tokens(self.request_id)

    async def outcome(self) -> Outcome:
        """How it ended; at once after the last tokens."""
        outcome = await self.futures.wait(self.request_id, self.owner, 60.0)
        assert outcome is not None, "the stream of tokens ends with the outcome"
        return outcome


def _value_of(outcome: Outcome) -> Any:
    """The result of a direct request; its failure becomes a RequestError."""
    if outcome.failed:
        failure = json.loads(outcome.body)
        raise RequestError(failure["error"], status=400 if failure["category"] == "user" else 500)
    return outcome.value


async def _unless_gone(work: asyncio.Future[Any], gone: Callable[[], Awaitable[bool]]) -> Any:
    """The result of ``work``; it is cancelled when ``gone`` says that the client has left."""
    while True:
        done, _ = await asyncio.wait([work], timeout=1.0)
        if done:
            return work.result()
        if await gone():
            work.cancel()
            raise RequestError("the client closed the connection", status=499)


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
    writer: Writer
    post: Any
    """``leader.inbox.put``."""
    stopping: bool = False
    started: float = field(default_factory=time.time)

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

    async def bring_folders(self) -> None:
        """Returns when every PEFT folder is as new as its adapter."""
        loop, done = asyncio.get_running_loop(), asyncio.Event()
        self.post(BringFolders(done=lambda: loop.call_soon_threadsafe(done.set)))
        await done.wait()
        await asyncio.to_thread(self.writer.flush)

    async def resolve_model(self, name: str, caller: Caller) -> VersionKey | None:
        """The version that ``base``, an adapter or ``adapter@version`` stands for; None is the base model.

        An adapter that has no version yet gets one of its current weights.

        Raises:
            RequestError: unknown, another owner's, or a version that is not kept: 404.
        """
        if name in (self.model.name, *self.model.aliases):
            return None
        adapter_id, at, number = name.rpartition("@")
        if not at:
            adapter_id = name
        row = self.own_adapter(adapter_id, caller)
        if at:
            key = (adapter_id, int(number) if number.isdecimal() and len(number) < 19 else -1)
            if not self.adapters.has_version(key):
                raise RequestError(f"model {adapter_id!r} has no version {number!r}; see /v1/models", status=404)
            return key
        newest = self.adapters.newest_version(adapter_id)
        if newest is None:
            request_id = self._direct(Publish(), row["owner"], row["tenant"], adapter_id)
            _value_of(await self.wait(request_id, row["owner"]))
            newest = self.adapters.newest_version(adapter_id)
            assert newest is not None, "it was just published"
        return newest

    def _direct(self, op: AdapterOp | Sample, owner: str, tenant: str, adapter_id: str | None = None) -> str:
        """Queues what a route waits for itself; it is not in the registry and does not outlive the process."""
        if self.stopping:
            raise RequestError("the server is stopping; try again", status=503)
        self._check_queue(tenant)
        request_id = f"direct-{uuid.uuid4()}"
        self._enqueue(request_id, "direct", owner, tenant, op, adapter_id, None)
        return request_id

    def _sampling_tenant(self, op: Sample, caller: Caller) -> str:
        return self.tenant(caller.owner, "base" if op.version is None else op.version[0])

    async def sample_now(
        self, ops: Sequence[Sample], caller: Caller, gone: Callable[[], Awaitable[bool]]
    ) -> list[tuple[Completion, ...]]:
        """Completions of each op, in order; stops sampling when the client is gone."""
        ids = [self._direct(op, caller.owner, self._sampling_tenant(op, caller)) for op in ops]
        try:
            outcomes = await _unless_gone(asyncio.gather(*(self.wait(i, caller.owner) for i in ids)), gone)
        except BaseException:
            for request_id in ids:
                self.cancel(request_id)
            raise
        return [_value_of(outcome) for outcome in outcomes]

    @asynccontextmanager
    async def sample_stream(self, op: Sample, caller: Caller) -> AsyncIterator[Flow]:
        """A sample whose tokens are read as they come; leaving early stops it."""
        request_id = self._direct(op, caller.owner, self._sampling_tenant(op, caller))
        self.futures.streams[request_id] = asyncio.Queue()
        try:
            yield Flow(futures=self.futures, request_id=request_id, owner=caller.owner)
        finally:
            del self.futures.streams[request_id]
            if request_id in self.futures.pending:
                self.cancel(request_id)

    async def wait(self, request_id: str, owner: str) -> Outcome:
        """The outcome of a request, however long it takes."""
        while True:
            outcome = await self.futures.wait(request_id, owner, 3600.0)
            if outcome is not None:
                return outcome

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
        message: Message = Entry(request_id=request_id, kind=kind, tenant=tenant, op=op, adapter_id=adapter_id, seq=seq)
        self.post(message)

    def version_of_sampler(self, sampler_id: str, caller: Caller) -> tuple[dict[str, Any], VersionKey | None]:
        """The registry's row of a sampling session of the caller's, and the version it is pinned to."""
        row = self.store.one("SELECT * FROM samplers WHERE sampler_id=?", sampler_id)
        if row is None or not (row["owner"] == caller.owner or caller.admin):
            raise RequestError(f"there is no sampling session {sampler_id!r}", status=404)
        return row, None if row["adapter_id"] is None else (row["adapter_id"], row["version"])
