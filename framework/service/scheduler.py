"""Who runs next. Rank 0 only; no tensors, no clocks of its own, no I/O: state in, decision out.

Every adapter has a queue in the order of its sequence numbers; the head runs, so optim_step and load are barriers
for that adapter and for nobody else. Tenants share the machine by time: each has a clock of the seconds it used, and
the one furthest behind goes next (start-time fair queueing, Goyal et al. 1996, with seconds as cost). A training
quantum (one microbatch or one short op) and an engine step are the two things that can be next; when both wait, the
side whose tenant is behind runs. A tenant that is behind and was just answered gets a moment to ask for more before
somebody else's quantum begins (anticipatory scheduling, Iyer & Druschel 2001): else one request per quantum is all
that a tenant with one request at a time could ever have.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from framework.service.ops import AdapterOp, Sample
from framework.service.plan import VersionKey


@dataclass(slots=True, kw_only=True)
class Entry:
    """A request in the queues."""

    request_id: str
    kind: str
    tenant: str
    op: AdapterOp | Sample
    adapter_id: str | None = None
    seq: int | None = None
    replay: bool = False
    """It was acknowledged before a restart and only rebuilds the state; nobody waits for its outcome."""
    started: bool = False


@dataclass(slots=True, kw_only=True)
class AdapterQueue:
    """Requests of one adapter, put back into the order of their sequence numbers."""

    adapter_id: str
    tenant: str
    next_seq: int = 0
    early: dict[int, Entry] = field(default_factory=dict)
    """Arrived before a smaller number did."""
    ready: deque[Entry] = field(default_factory=deque)
    gap_since: float | None = None
    """Since when a smaller number has been missing."""
    last_run: float = 0.0

    def add(self, entry: Entry, now: float) -> None:
        """Files an entry; one without a number goes behind what is ready."""
        if entry.seq is None:
            self.ready.append(entry)
            return
        self.early[entry.seq] = entry
        self._advance(now)

    def skip_gap(self, now: float) -> list[Entry]:
        """Gives up on the missing numbers: what waited for them is returned, to be failed."""
        waiting = [self.early[seq] for seq in sorted(self.early)]
        self.next_seq = max(self.early) + 1
        self.early.clear()
        self._advance(now)
        return waiting

    def _advance(self, now: float) -> None:
        while self.next_seq in self.early:
            self.ready.append(self.early.pop(self.next_seq))
            self.next_seq += 1
            self.gap_since = None
        if not self.early:
            self.gap_since = None
        elif self.gap_since is None:
            self.gap_since = now


@dataclass(slots=True, kw_only=True)
class Part:
    """One of a Sample's ``num_samples`` completions."""

    entry: Entry
    index: int

    @property
    def engine_id(self) -> str:
        return f"{self.entry.request_id}#{self.index}"


@dataclass(slots=True, kw_only=True)
class Tenant:
    """Who shares the machine, and how much of it was used."""

    clock: float = 0.0
    """Seconds of machine time used, comparable between tenants."""
    samples: deque[Part] = field(default_factory=deque)
    in_flight: int = 0
    last_sampled: float = float("-inf")
    answered: float = float("-inf")
    """When a request of its ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What to do next; empty when nothing waits."""

    submit: tuple[Part, ...] = ()
    train: Entry | None = None
    step: bool = False
    wants_slot: VersionKey | None = None
    """The version a waiting sample needs in the engine but which has no slot."""


@dataclass(slots=True, kw_only=True)
class Scheduler:
    """The queues. ``next_decision`` only reads; the other methods are told what happened."""

    max_in_flight: int
    share_memory_s: float = 10.0
    """A tenant that sampled this recently keeps its share of the engine free."""
    patience_s: float = 0.01
    """How long a tenant that is behind may take from an answer to its next request."""
    virtual: float = 0.0
    """Clock of whoever was served last, when that began."""
    queues: dict[str, AdapterQueue] = field(default_factory=dict)
    tenants: dict[str, Tenant] = field(default_factory=dict)

    def tenant(self, name: str) -> Tenant:
        """The tenant's record; one that was idle starts at the clock of those who are not, without saved-up credit."""
        known = self.tenants.setdefault(name, Tenant())
        if not self._busy(name):
            floor = self.virtual if self._busy_names() else max(tenant.clock for tenant in self.tenants.values())
            known.clock = max(known.clock, floor)
        return known

    def add(self, entry: Entry, now: float) -> None:
        """Files a request."""
        tenant = self.tenant(entry.tenant)
        if isinstance(entry.op, Sample):
            tenant.samples.extend(Part(entry=entry, index=index) for index in range(entry.op.num_samples))
            return
        assert entry.adapter_id is not None, "every op but a sample belongs to an adapter"
        self.queue(entry.adapter_id, entry.tenant).add(entry, now)

    def queue(self, adapter_id: str, tenant: str) -> AdapterQueue:
        return self.queues.setdefault(adapter_id, AdapterQueue(adapter_id=adapter_id, tenant=tenant))

    def next_decision(
        self, now: float, *, resident: Callable[[VersionKey | None], bool], blocked: frozenset[str] = frozenset()
    ) -> Decision:
        """What should run next.

        Args:
            now: monotonic seconds.
            resident: whether a version can be sampled at once.
            blocked: adapters whose head cannot run yet (its version waits for an engine slot).
        """
        submit, wants_slot = self.submissions(now, resident)
        heads = [queue for queue in self.queues.values() if queue.ready and queue.adapter_id not in blocked]
        head = min(heads, key=lambda q: (self.tenants[q.tenant].clock, q.last_run), default=None)
        sampling = {part.entry.tenant for part in submit} | {n for n, t in self.tenants.items() if t.in_flight}
        if head is None or not sampling:
            return Decision(
                submit=submit, train=head.ready[0] if head else None, step=bool(sampling), wants_slot=wants_slot
            )
        behind = min(self.tenants[name].clock for name in sampling)
        train_clock = self.tenants[head.tenant].clock
        return Decision(
            submit=submit,
            train=head.ready[0] if train_clock <= behind else None,
            step=behind <= train_clock,
            wants_slot=wants_slot,
        )

    def submissions(
        self, now: float, resident: Callable[[VersionKey | None], bool]
    ) -> tuple[tuple[Part, ...], VersionKey | None]:
        """Completions to start, tenants by clock, each within its share of the engine."""
        sharing = sum(
            1 for t in self.tenants.values() if t.samples or t.in_flight or now - t.last_sampled < self.share_memory_s
        )
        share = max(1, self.max_in_flight // max(1, sharing))
        free = self.max_in_flight - sum(tenant.in_flight for tenant in self.tenants.values())
        chosen: list[Part] = []
        wants_slot: VersionKey | None = None
        for tenant in sorted((t for t in self.tenants.values() if t.samples), key=lambda t: t.clock):
            room = min(free - len(chosen), share - tenant.in_flight)
            for part in tenant.samples:
                if room <= 0:
                    break
                assert isinstance(part.entry.op, Sample)
                if resident(part.entry.op.version):
                    chosen.append(part)
                    room -= 1
                elif wants_slot is None:
                    wants_slot = part.entry.op.version
        return tuple(chosen), wants_slot

    def started(self, parts: Iterable[Part], now: float) -> None:
        """These completions are in the engine."""
        taken = {id(part) for part in parts}
        for tenant in self.tenants.values():
            mine = [part for part in tenant.samples if id(part) in taken]
            if mine:
                tenant.in_flight += len(mine)
                tenant.last_sampled = now
                tenant.samples = deque(part for part in tenant.samples if id(part) not in taken)

    def ended(self, tenant: str, count: int = 1) -> None:
        """That many of the tenant's completions left the engine."""
        self.tenants[tenant].in_flight -= count

    def cancel(self, request_id: str) -> int:
        """Takes a request's completions that have not started out of the queue; returns how many."""
        dropped = 0
        for tenant in self.tenants.values():
            kept = deque(part for part in tenant.samples if part.entry.request_id != request_id)
            dropped += len(tenant.samples) - len(kept)
            tenant.samples = kept
        return dropped

    def finish(self, entry: Entry) -> None:
        """The head of its adapter's queue is done."""
        assert entry.adapter_id is not None
        head = self.queues[entry.adapter_id].ready.popleft()
        assert head is entry, "only the head of a queue runs"

    def patience(self, decision: Decision, now: float) -> float:
        """Seconds that a training quantum should wait for the next request of somebody who is behind its tenant."""
        if decision.train is None or decision.step or decision.submit:
            return 0.0
        name = decision.train.tenant
        ends = [
            tenant.answered + self.patience_s
            for other, tenant in self.tenants.items()
            if tenant.answered + self.patience_s > now
            and other != name
            and tenant.clock < self.tenants[name].clock
            and not self._busy(other)
        ]
        return max(ends, default=now) - now

    def answered(self, tenant: str, now: float) -> None:
        """A request of the tenant's ended."""
        self.tenants[tenant].answered = now

    def charge_training(self, entry: Entry, seconds: float, now: float) -> None:
        self.virtual = max(self.virtual, self.tenants[entry.tenant].clock)
        self.tenants[entry.tenant].clock += seconds
        if entry.adapter_id is not None:
            self.queues[entry.adapter_id].last_run = now

    def charge_step(self, seconds: float) -> None:
        """Splits an engine step's time by completions in flight."""
        flying = [tenant for tenant in self.tenants.values() if tenant.in_flight]
        total = sum(tenant.in_flight for tenant in flying)
        self.virtual = max(self.virtual, min((tenant.clock for tenant in flying), default=0.0))
        for tenant in flying:
            tenant.clock += seconds * tenant.in_flight / total

    def gaps(self, now: float, timeout_s: float) -> list[AdapterQueue]:
        """Queues that have waited too long for a missing number."""
        return [q for q in self.queues.values() if q.gap_since is not None and now - q.gap_since > timeout_s]

    @property
    def idle(self) -> bool:
        return not any(self._busy_names())

    def _busy(self, name: str) -> bool:
        tenant = self.tenants[name]
        return bool(tenant.samples or tenant.in_flight) or any(
            queue.ready for queue in self.queues.values() if queue.tenant == name
        )

    def _busy_names(self) -> list[str]:
        training = {queue.tenant for queue in self.queues.values() if queue.ready}
        return [name for name, t in self.tenants.items() if t.samples or t.in_flight or name in training]
