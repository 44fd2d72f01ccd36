"""Rank 0's side of the loop, planning: requests in, plans out.

It turns the scheduler's decision into actions: making room, bringing adapters and versions back, and only then the
work itself. What the ranks report goes to :mod:`framework.service.reports`.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from framework.engine.base import StepOutput
from framework.service.adapters import Adapter, checkpoint_path
from framework.service.board import Board, Sampling
from framework.service.housekeeping import sweep
from framework.service.ops import (
    CreateAdapter,
    LoadState,
    OptimStep,
    Publish,
    Refuse,
    RemoveAdapter,
    RequestError,
    Sample,
    SaveCheckpoint,
    TrainBatch,
)
from framework.service.plan import (
    Abort,
    Action,
    Export,
    LoadVersion,
    Plan,
    Restore,
    Run,
    Snapshot,
    Submit,
    UnloadVersion,
    VersionKey,
)
from framework.service.replies import failure_reply
from framework.service.reports import Reports
from framework.service.scheduler import Entry, Part
from framework.service.tensors import has_shards


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancel:
    """Nobody waits for this sample any more."""

    request_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """Finish what runs within the grace period, save, end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BringFolders:
    """Somebody wants to read PEFT folders: bring those that are behind up to date."""

    done: Callable[[], object]
    """Called on the loop's thread when their writing has been asked for."""


Message = Entry | Cancel | Stop | BringFolders
SWEEP_EVERY_S = 30.0
EXPORT_IDLE_S, EXPORT_BUSY_S = 0.1, 2.0
"""How far a PEFT folder may be behind its adapter when there is nothing else to do, and when there is."""


@dataclass(slots=True, kw_only=True)
class Leader:
    """Plans on the loop's thread; only ``inbox.put`` is called from others."""

    board: Board
    reports: Reports
    inbox: queue.SimpleQueue[Message] = field(default_factory=queue.SimpleQueue)
    stop_at: float | None = None
    sweep_at: float = 0.0
    readers: list[Callable[[], object]] = field(default_factory=list)
    """Who waits for the PEFT folders."""

    def report(self, plan: Plan, results: list[Any], seconds: list[float]) -> None:
        """What became of the actions of a plan."""
        self.reports.report(plan, results, seconds)
        if not self.board.unexported:
            for done in self.readers:
                done()
            self.readers.clear()

    def stepped(self, output: StepOutput, seconds: float) -> None:
        """What the engine step produced."""
        self.reports.stepped(output, seconds)

    def plan(self) -> Plan:
        """The next turn; waits for a request when there is nothing to do."""
        self._receive()
        while True:
            now = time.monotonic()
            self._close_gaps(now)
            if now > self.sweep_at:
                self.sweep_at = now + SWEEP_EVERY_S
                sweep(self.board)
            if self.stop_at is not None and (self._quiet() or now > self.stop_at):
                return self._last_plan()
            actions: list[Action] = [Abort(engine_ids=tuple(self.board.aborts))] if self.board.aborts else []
            self.board.aborts.clear()
            decision = self.board.scheduler.next_decision(now, resident=self._resident, blocked=self._blocked())
            patience = 0.0 if actions or self.stop_at is not None else self.board.scheduler.patience(decision, now)
            if patience and self._receive_blocking(patience):
                continue
            actions += self._submissions(decision.submit, now)
            if decision.wants_slot is not None:
                actions += self._load_version(decision.wants_slot, now)
            if decision.train is not None:
                try:
                    actions += self._training(decision.train)
                except RequestError as error:
                    self.board.fail(decision.train, str(error), "user")
                    self.board.flush()
                    if not actions and not decision.step:
                        continue
            actions += self._snapshots()
            if self.readers:
                actions += [self._export(name) for name in list(self.board.unexported)]
            actions += self._exports_due(now, EXPORT_IDLE_S if not actions and not decision.step else EXPORT_BUSY_S)
            self.board.flush()
            if actions or decision.step or self.readers:
                return Plan(actions=tuple(actions), step=decision.step or bool(self.board.parts))
            waits = [since + EXPORT_IDLE_S - now for since in self.board.unexported.values()]
            if not self._receive_blocking(max(0.0, min([self.board.config.heartbeat_s, *waits]))):
                return Plan()

    def _receive(self) -> None:
        while True:
            try:
                self._take(self.inbox.get_nowait())
            except queue.Empty:
                return

    def _receive_blocking(self, timeout_s: float) -> bool:
        """Waits for a message; False if none came in time."""
        try:
            self._take(self.inbox.get(timeout=timeout_s))
        except queue.Empty:
            return False
        self._receive()
        return True

    def _take(self, message: Message) -> None:
        if isinstance(message, Stop):
            self.stop_at = time.monotonic() + self.board.config.stop_grace_s
        elif isinstance(message, Cancel):
            self.board.aborts += self.reports.drop_sample(message.request_id, "cancelled", "user")
        elif isinstance(message, BringFolders):
            self.readers.append(message.done)
        else:
            self.board.scheduler.add(message, time.monotonic())
            if isinstance(message.op, Sample):
                self.board.sampling[message.request_id] = Sampling(entry=message)

    def _quiet(self) -> bool:
        """Nothing is in the middle of something."""
        queues = self.board.scheduler.queues.values()
        return not self.board.parts and not any(q.ready and q.ready[0].started for q in queues)

    def _last_plan(self) -> Plan:
        """Saves every adapter that has unsaved training, unless it is in the middle of a batch."""
        actions: list[Action] = []
        for adapter_id in self.board.trainer_slots.resident:
            adapter = self.board.adapters.known[adapter_id]
            if adapter.unsaved_s and not self.board.trainer_slots.users[adapter_id]:
                actions += self._snapshot(adapter, evict=False)
        actions += [self._export(adapter_id) for adapter_id in list(self.board.unexported)]
        return Plan(actions=tuple(actions), stop=True)

    def _close_gaps(self, now: float) -> None:
        for waiting in self.board.scheduler.gaps(now, self.board.config.gap_timeout_s):
            text = (
                f"request {waiting.next_seq} of {waiting.adapter_id} did not come within "
                f"{self.board.config.gap_timeout_s:g} s; those behind it are given up"
            )
            for entry in waiting.skip_gap(now):
                self.board.resolve(entry, failure_reply(text, "server"))
        self.board.flush()

    def _resident(self, key: VersionKey | None) -> bool:
        if self.stop_at is not None:
            return False
        return key is None or (key in self.board.engine_slots and key != self.board.draining)

    def _blocked(self) -> frozenset[str]:
        """Adapters whose head needs an engine slot while none can be freed; once stopping, all that did not start."""
        held = set()
        for name, waiting in self.board.scheduler.queues.items():
            if not waiting.ready or waiting.ready[0].started:
                continue
            pushes = isinstance(waiting.ready[0].op, CreateAdapter | OptimStep | LoadState | Publish | SaveCheckpoint)
            if self.stop_at is not None or (pushes and self._free_engine_slot(dry=True) is None):
                held.add(name)
        return frozenset(held)

    def _free_engine_slot(self, *, dry: bool = False) -> list[Action] | None:
        """Actions that leave a slot free, or None while every slot is in use (then the oldest starts draining)."""
        slots = self.board.engine_slots
        if not slots.full:
            return []
        victim = slots.victim()
        if victim is None:
            self.board.draining = self.board.draining or next(iter(slots.resident))
            return None
        if not dry:
            slots.drop(victim)
            self.board.draining = None
        return [UnloadVersion(key=victim)]

    def _load_version(self, key: VersionKey, now: float) -> list[Action]:
        """Brings a version back and starts what waits for it, before anybody else can want the slot."""
        actions = None if self._comes_back(key) else self._free_engine_slot()
        if actions is None:
            return []
        self.board.engine_slots.touch(key)
        load = LoadVersion(
            key=key, spec=self.board.adapters.spec(key[0]), folder=str(self.board.adapters.paths.version(key))
        )
        waiting, _ = self.board.scheduler.submissions(now, self._resident)
        return [*actions, load, *self._submissions(waiting, now)]

    def _submissions(self, parts: tuple[Part, ...], now: float) -> list[Action]:
        actions: list[Action] = []
        for part in parts:
            op = part.entry.op
            assert isinstance(op, Sample)
            sampling = op.sampling
            if sampling.seed is not None:
                sampling = replace(sampling, seed=sampling.seed + part.index)
            if op.version is not None:
                self.board.engine_slots.use(op.version)
            self.board.parts[part.engine_id] = part
            actions.append(
                Submit(engine_id=part.engine_id, prompt=op.prompt, sampling=sampling, key=op.version, stream=op.stream)
            )
        self.board.scheduler.started(parts, now)
        return actions

    def _training(self, entry: Entry) -> list[Action]:
        """What it takes to run the next quantum of an adapter's head.

        Raises:
            RequestError: it cannot run at all.
        """
        op, adapter_id = entry.op, entry.adapter_id
        assert adapter_id is not None
        assert not isinstance(op, Sample)
        if isinstance(op, Refuse):
            raise RequestError(op.message)
        adapter = self.board.adapters.get(adapter_id)
        if isinstance(op, RemoveAdapter):
            self.board.unexported.pop(adapter_id, None)
        if isinstance(op, RemoveAdapter) and adapter_id not in self.board.trainer_slots:
            self.reports.removed(adapter)
            self.board.succeed(entry, None)
            return []
        run = self._bind(entry, adapter)
        actions: list[Action] = []
        if isinstance(op, CreateAdapter) and op.source is not None:  # it may be the folder of an adapter here
            actions += [self._export(name) for name in list(self.board.unexported)]
        if run.publish_as is not None:
            freed = self._free_engine_slot()
            if freed is None:  # samples of this very turn took the last one
                return []
            actions += freed
            self.board.engine_slots.touch(run.publish_as)
        actions += self._bring(adapter, fresh=isinstance(op, CreateAdapter))
        if isinstance(op, TrainBatch) and not entry.started:
            self.board.trainer_slots.use(adapter_id)
        entry.started = True
        return [*actions, run]

    def _bring(self, adapter: Adapter, *, fresh: bool) -> list[Action]:
        """Makes the adapter resident in the trainer, sending the least recently used one to its folder if need be."""
        actions: list[Action] = []
        if adapter.adapter_id not in self.board.trainer_slots:
            if self.board.trainer_slots.full:
                victim = self.board.trainer_slots.victim()
                if victim is None:
                    raise RequestError("every adapter in the trainer is in the middle of a batch", status=503)
                self.board.trainer_slots.drop(victim)
                actions += self._snapshot(self.board.adapters.known[victim], evict=True)
            if not fresh:
                actions.append(
                    Restore(
                        adapter_id=adapter.adapter_id, spec=adapter.spec, seed=adapter.seed, snapshot=adapter.snapshot
                    )
                )
        self.board.trainer_slots.touch(adapter.adapter_id)
        return actions

    def _bind(self, entry: Entry, adapter: Adapter) -> Run:
        """Looks up what the op names and decides where it writes."""
        op, paths = entry.op, self.board.adapters.paths
        assert not isinstance(op, Sample | Refuse)
        run = Run(request_id=entry.request_id, adapter_id=adapter.adapter_id, op=None if entry.started else op)
        if isinstance(op, CreateAdapter | LoadState) and op.source is not None:
            run = replace(run, source=self._source(op.source, adapter.owner))
        if isinstance(op, SaveCheckpoint) and not op.overwrite and not entry.replay:
            path = checkpoint_path(adapter.adapter_id, op.kind, op.name)
            if self.board.store.one("SELECT 1 FROM checkpoints WHERE path=?", path):
                raise RequestError(f"checkpoint {path} already exists; give another name or overwrite it")
        if isinstance(op, SaveCheckpoint) and op.kind != "sampler_weights":
            return replace(run, folder=str(paths.new_checkpoint(adapter.adapter_id, op.kind, op.name)))
        at_once = adapter.simple and isinstance(op, CreateAdapter | OptimStep | LoadState)
        if not at_once and not isinstance(op, Publish | SaveCheckpoint):
            return run
        changed = isinstance(op, OptimStep | LoadState)
        key = (adapter.adapter_id, adapter.version + changed)
        known, folder = self.board.adapters.has_version(key), paths.version(key)
        if isinstance(op, SaveCheckpoint):
            run = replace(run, folder=str(folder))
        publish = known and not self._written(key) if entry.replay else changed or not known
        return replace(run, folder=str(folder), publish_as=key) if publish else run

    def _written(self, key: VersionKey) -> bool:
        return has_shards(self.board.adapters.paths.version(key), self.board.config.num_ranks)

    def _comes_back(self, key: VersionKey) -> bool:
        """A kill came before the version's file was written; a request that is to be repeated makes it again."""
        waiting = self.board.scheduler.queues.get(key[0])
        return waiting is not None and any(entry.replay for entry in waiting.ready) and not self._written(key)

    def _source(self, source: str, owner: str) -> str:
        if not source.startswith("tinker://"):
            return source
        return str(self.board.adapters.checkpoint(source, owner, kind="weights")["info"]["folder"])

    def _snapshot(self, adapter: Adapter, *, evict: bool) -> list[Action]:
        """The PEFT folder first: what was asked until a snapshot is not repeated after a restart."""
        behind = adapter.adapter_id in self.board.unexported
        exports: list[Action] = [self._export(adapter.adapter_id)] if behind else []
        folder = None
        if adapter.unsaved_s or adapter.snapshot is None:
            folder = str(self.board.adapters.paths.snapshot(adapter.adapter_id, adapter.executed_seq))
        return [*exports, Snapshot(adapter_id=adapter.adapter_id, folder=folder, evict=evict)]

    def _export(self, adapter_id: str) -> Export:
        del self.board.unexported[adapter_id]
        return Export(adapter_id=adapter_id, folder=str(self.board.adapters.paths.peft(adapter_id)))

    def _exports_due(self, now: float, after_s: float) -> list[Action]:
        """At most one adapter whose PEFT folder has been behind for so long."""
        due = next((name for name, since in self.board.unexported.items() if now - since > after_s), None)
        return [] if due is None else [self._export(due)]

    def _snapshots(self) -> list[Action]:
        """At most one adapter that has trained long enough since its last snapshot."""
        for adapter_id in self.board.trainer_slots.resident:
            adapter = self.board.adapters.known[adapter_id]
            due = adapter.unsaved_s > self.board.config.snapshot_after_s
            if due and not self.board.trainer_slots.users[adapter_id]:
                return self._snapshot(adapter, evict=False)
        return []
