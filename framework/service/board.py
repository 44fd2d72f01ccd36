"""What planning and reporting share on rank 0: slots, requests under way, and outcomes on their way out."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from framework.service.adapters import Adapters
from framework.service.metrics import Metrics
from framework.service.ops import Outcome
from framework.service.plan import VersionKey
from framework.service.replies import failure_reply, reply
from framework.service.scheduler import Entry, Part, Scheduler
from framework.service.slots import Slots
from framework.service.store import Store
from framework.types import Completion

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopConfig:
    """Times and sizes of the loop."""

    trainer_slots: int
    engine_slots: int
    num_ranks: int
    """Each writes its shards of a version."""
    snapshot_after_s: float
    """Seconds of training per adapter that a restart may have to repeat."""
    gap_timeout_s: float
    keep_versions: int
    session_timeout_s: float
    outcome_ttl_s: float
    heartbeat_s: float
    """Other ranks hear from rank 0 at least this often; well below the collectives' timeout."""
    stop_grace_s: float


@dataclass(slots=True, kw_only=True)
class Sampling:
    """A Sample under way."""

    entry: Entry
    done: dict[int, Completion] = field(default_factory=dict)
    """Finished completions by index."""


@dataclass(slots=True, kw_only=True)
class Board:
    """State of rank 0's loop; touched by the loop's thread only."""

    config: LoopConfig
    store: Store
    adapters: Adapters
    scheduler: Scheduler
    deliver: Callable[[list[tuple[str, Outcome]]], None]
    """Tells the HTTP thread, after the outcomes are in the registry."""
    metrics: Metrics
    stream: Callable[[str, int, tuple[int, ...]], None]
    """(request id, sample index, new tokens) for samples that asked for them."""
    trainer_slots: Slots[str] = field(init=False)
    engine_slots: Slots[VersionKey] = field(init=False)
    sampling: dict[str, Sampling] = field(default_factory=dict)
    """Samples under way by request id."""
    parts: dict[str, Part] = field(default_factory=dict)
    """Completions in the engine by engine id."""
    aborts: list[str] = field(default_factory=list)
    """Completions to be taken out of the engine with the next plan."""
    draining: VersionKey | None = None
    """Gets no new samples, so that its slot becomes free for a version that waits."""
    unexported: dict[str, float] = field(default_factory=dict)
    """Adapters of the simple client whose PEFT folder is behind, and since when (monotonic seconds)."""
    outcomes: list[tuple[str, Outcome]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.trainer_slots = Slots(capacity=self.config.trainer_slots)
        self.engine_slots = Slots(capacity=self.config.engine_slots)

    def succeed(self, entry: Entry, result: object) -> None:
        """The head of an adapter's queue is done."""
        self._leave(entry)
        self.resolve(entry, reply(entry, result))

    def fail(self, entry: Entry, message: str, category: str) -> None:
        """The head of an adapter's queue failed; the next one runs."""
        self._leave(entry)
        self.resolve(entry, failure_reply(message, category))

    def _leave(self, entry: Entry) -> None:
        assert entry.adapter_id is not None
        self.scheduler.finish(entry)
        adapter = self.adapters.known.get(entry.adapter_id)
        if adapter is not None and entry.seq is not None:
            adapter.executed_seq = max(adapter.executed_seq, entry.seq)

    def resolve(self, entry: Entry, outcome: Outcome) -> None:
        """Keeps an outcome for the next flush; replayed requests have theirs already."""
        if not entry.replay:
            self.scheduler.answered(entry.tenant, time.monotonic())
            self.outcomes.append((entry.request_id, outcome))
            self.metrics.outcomes.labels(entry.kind, str(outcome.failed).lower()).inc()

    def flush(self) -> None:
        """Writes outcomes down, then tells."""
        if not self.outcomes:
            return
        ready, self.outcomes = self.outcomes, []
        self.store.finish([(name, o.body, o.content_type, o.failed) for name, o in ready if o.value is None])
        self.deliver(ready)
