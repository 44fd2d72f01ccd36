"""Futures of requests: the one way from the loop's thread to the event loop. One event each, no polling of anything.

Outcomes are in the registry too; here the newest are kept at hand, so that a lost reply can be fetched again.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from framework.service.ops import Outcome, RequestError
from framework.service.store import Store

KEPT_OUTCOMES = 1024
Tokens = tuple[int, tuple[int, ...]]


@dataclass(slots=True, kw_only=True)
class Futures:
    """``deliver`` and ``stream`` are called by the loop's thread, the other methods on the event loop."""

    store: Store
    loop: asyncio.AbstractEventLoop | None = None
    """Set when the HTTP server runs; until then nobody waits."""
    attaching: threading.Lock = field(default_factory=threading.Lock)
    pending: dict[str, tuple[str, str, asyncio.Event]] = field(default_factory=dict)
    """(owner, tenant, event) by request id."""
    waiting: Counter[str] = field(default_factory=Counter)
    """Pending requests of each tenant."""
    recent: OrderedDict[str, tuple[str, Outcome]] = field(default_factory=OrderedDict)

    streams: dict[str, asyncio.Queue[Tokens | None]] = field(default_factory=dict)
    """New tokens of samples that somebody reads as they come."""

    def deliver(self, outcomes: list[tuple[str, Outcome]]) -> None:
        """Hands over outcomes that are in the registry."""
        with self.attaching:
            if self.loop is None:  # after a restart requests may end before the first poll can come
                self.resolve(outcomes)
            elif not self.loop.is_closed():
                self.loop.call_soon_threadsafe(self.resolve, outcomes)

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """The event loop runs; from now on it is the only one to touch the futures."""
        with self.attaching:
            self.loop = loop

    def stream(self, request_id: str, index: int, tokens: tuple[int, ...]) -> None:
        """Hands over new tokens of one completion of a sample."""
        if self.loop is not None and not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self._stream, request_id, (index, tokens))

    def _stream(self, request_id: str, item: Tokens | None) -> None:
        if request_id in self.streams:
            self.streams[request_id].put_nowait(item)

    async def tokens(self, request_id: str) -> AsyncIterator[Tokens]:
        """(completion's index, new tokens) as they come, until the sample ends."""
        queue = self.streams[request_id]
        while (item := await queue.get()) is not None:
            yield item

    def open(self, request_id: str, owner: str, tenant: str) -> None:
        """A request was accepted."""
        self.pending[request_id] = (owner, tenant, asyncio.Event())
        self.waiting[tenant] += 1

    def resolve(self, outcomes: list[tuple[str, Outcome]]) -> None:
        """Requests ended."""
        for request_id, outcome in outcomes:
            waiting = self.pending.pop(request_id, None)
            if waiting is None:
                continue
            owner, tenant, event = waiting
            self.waiting[tenant] -= 1
            if not self.waiting[tenant]:
                del self.waiting[tenant]
            self.recent[request_id] = (owner, outcome)
            event.set()
            self._stream(request_id, None)
        while len(self.recent) > KEPT_OUTCOMES:
            self.recent.popitem(last=False)

    async def wait(self, request_id: str, owner: str, timeout_s: float) -> Outcome | None:
        """The outcome, or None if it takes longer than ``timeout_s``.

        Raises:
            RequestError: this owner has no such request, 404.
        """
        waiting = self.pending.get(request_id)
        if waiting is not None and waiting[0] == owner:
            try:
                await asyncio.wait_for(waiting[2].wait(), timeout_s)
            except TimeoutError:
                return None
        known = self.recent.get(request_id)
        if known is not None and known[0] == owner:
            return known[1]
        row = self.store.one(
            "SELECT * FROM requests WHERE request_id=? AND owner=? AND status!='pending'", request_id, owner
        )
        if row is None:
            raise RequestError(f"there is no request {request_id!r}; its outcome may have been dropped", status=404)
        return Outcome(body=row["body"], content_type=row["content_type"], failed=row["status"] == "failed")
