"""Rank 0's side of the loop, reporting: what the ranks did becomes registry rows and outcomes."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from framework.engine.base import StepOutput
from framework.service.adapters import Adapter, checkpoint_path
from framework.service.board import Board
from framework.service.ops import (
    CreateAdapter,
    LoadState,
    OptimStep,
    Publish,
    RemoveAdapter,
    Sample,
    SaveCheckpoint,
    TrainBatch,
)
from framework.service.plan import (
    Export,
    Failure,
    LoadVersion,
    Plan,
    Progress,
    Restore,
    Run,
    Snapshot,
    Submit,
    VersionKey,
)
from framework.service.replies import failure_reply, reply
from framework.service.scheduler import Entry, Part
from framework.service.tensors import folder_size

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reports:
    """Turns what the ranks report into rows and outcomes; called by the leader."""

    board: Board

    def report(self, plan: Plan, results: list[Any], seconds: list[float]) -> None:
        """Takes the results of a plan's actions, in their order."""
        handlers: dict[type, Callable[[Any, Any, float], None]] = {
            Run: self._ran,
            Submit: self._submitted,
            Snapshot: self._saved,
            Export: self._exported,
            Restore: self._restored,
            LoadVersion: self._loaded,
        }
        for action, result, spent in zip(plan.actions, results, seconds, strict=True):
            handler = handlers.get(type(action))
            if handler is not None:
                handler(action, result, spent)
        self.board.flush()
        metrics = self.board.metrics
        metrics.in_flight.set(len(self.board.parts))
        metrics.trainer_adapters.set(len(self.board.trainer_slots.resident))
        metrics.engine_versions.set(len(self.board.engine_slots.resident))

    def stepped(self, output: StepOutput, seconds: float) -> None:
        """Takes what one engine step produced."""
        board = self.board
        board.scheduler.charge_step(seconds)
        board.metrics.step_seconds.observe(seconds)
        for engine_id, tokens in output.new_tokens.items():
            part = board.parts.get(engine_id)
            if part is not None and isinstance(part.entry.op, Sample) and part.entry.op.stream:
                board.stream(part.entry.request_id, part.index, tokens)
        for engine_id, completion in output.finished.items():
            part = self._left_engine(engine_id)
            if part is None:
                continue
            board.metrics.sampled_tokens.inc(len(completion.token_ids))
            entry, op = part.entry, part.entry.op
            assert isinstance(op, Sample)
            done = board.sampling[entry.request_id].done
            done[part.index] = completion
            if len(done) == op.num_samples:
                del board.sampling[entry.request_id]
                board.resolve(entry, reply(entry, tuple(done[index] for index in sorted(done))))
        board.flush()

    def _left_engine(self, engine_id: str) -> Part | None:
        part = self.board.parts.pop(engine_id, None)
        if part is None:
            return None
        assert isinstance(part.entry.op, Sample)
        self.board.scheduler.ended(part.entry.tenant)
        if part.entry.op.version is not None:
            self.board.engine_slots.release(part.entry.op.version)
        return part

    def drop_sample(self, request_id: str, message: str, category: str) -> list[str]:
        """Fails a sample that is under way; returns the engine ids of its completions that are in the engine."""
        board = self.board
        sampling = board.sampling.pop(request_id, None)
        if sampling is None:
            return []
        board.scheduler.cancel(request_id)
        flying = [engine_id for engine_id, part in board.parts.items() if part.entry is sampling.entry]
        for engine_id in flying:
            self._left_engine(engine_id)
        board.resolve(sampling.entry, failure_reply(message, category))
        return flying

    def _submitted(self, action: Submit, result: Any, seconds: float) -> None:
        """A completion that the engine refuses fails its whole sample."""
        if isinstance(result, Failure):
            part = self._left_engine(action.engine_id)
            if part is not None:
                self.board.aborts += self.drop_sample(part.entry.request_id, result.message, result.category)

    def _saved(self, action: Snapshot, result: Any, seconds: float) -> None:
        adapter = self.board.adapters.known[action.adapter_id]
        if isinstance(result, Failure):
            log.error("snapshot of %s failed: %s", action.adapter_id, result.message)
            adapter.unsaved_s = 1e-6  # still unsaved, but not due again at once
            if action.evict:
                self.board.trainer_slots.resident[action.adapter_id] = None
        elif action.folder is not None:
            self.board.adapters.saved(adapter, action.folder)

    def _exported(self, action: Export, result: Any, seconds: float) -> None:
        if isinstance(result, Failure):
            log.error("export of %s failed: %s", action.adapter_id, result.message)

    def _restored(self, action: Restore, result: Any, seconds: float) -> None:
        if isinstance(result, Failure):
            self.board.trainer_slots.drop(action.adapter_id)

    def _loaded(self, action: LoadVersion, result: Any, seconds: float) -> None:
        """A version that cannot be brought back fails the samples that wait for it."""
        if not isinstance(result, Failure):
            return
        self.board.engine_slots.drop(action.key)
        for tenant in self.board.scheduler.tenants.values():
            for request_id in {p.entry.request_id for p in tenant.samples if _version(p.entry) == action.key}:
                self.drop_sample(request_id, result.message, result.category)

    def _ran(self, action: Run, result: Any, seconds: float) -> None:
        board = self.board
        entry = board.scheduler.queues[action.adapter_id].ready[0]
        assert entry.request_id == action.request_id, "the head is what ran"
        adapter = board.adapters.known[action.adapter_id]
        board.scheduler.charge_training(entry, seconds, time.monotonic())
        board.metrics.op_seconds.labels(type(entry.op).__name__).observe(seconds)
        adapter.unsaved_s += seconds
        if isinstance(result, Progress):
            return
        if board.trainer_slots.users[action.adapter_id]:
            board.trainer_slots.release(action.adapter_id)
        if isinstance(result, Failure):
            self._failed(entry, adapter, action, result)
            return
        op = entry.op
        if isinstance(op, TrainBatch) and op.backward:
            board.metrics.trained_tokens.inc(op.num_tokens)
        if isinstance(op, OptimStep | LoadState):
            adapter.version += 1
        if isinstance(op, LoadState) or (isinstance(op, CreateAdapter) and op.source is not None):
            adapter.unsaved_s = float("inf")  # what it was loaded from may be deleted: save it before anything else
        if action.publish_as is not None:
            board.adapters.add_version(action.publish_as)
        if adapter.simple and isinstance(op, CreateAdapter | OptimStep | LoadState):
            board.unexported.setdefault(adapter.adapter_id, time.monotonic())
        if isinstance(op, Publish) and not entry.replay:
            self._pin(op, adapter)
        elif isinstance(op, SaveCheckpoint) and not entry.replay:
            self._register(op, adapter, action)
        elif isinstance(op, RemoveAdapter):
            board.trainer_slots.drop(action.adapter_id)
            self.removed(adapter)
        board.succeed(entry, result)

    def _failed(self, entry: Entry, adapter: Adapter, action: Run, failure: Failure) -> None:
        if action.publish_as is not None:
            self.board.engine_slots.drop(action.publish_as)
        if isinstance(entry.op, CreateAdapter):
            self.board.trainer_slots.drop(action.adapter_id)
            self.removed(adapter)
        self.board.fail(entry, failure.message, failure.category)

    def _pin(self, op: Publish, adapter: Adapter) -> None:
        """The sampling session answers with these weights from now on."""
        if op.sampling_session_id is not None:
            row = {
                "sampler_id": op.sampling_session_id,
                "session_id": op.sampling_session_id.rpartition(":sample:")[0],
                "owner": adapter.owner,
                "model_path": None,
                "adapter_id": adapter.adapter_id,
                "version": adapter.version,
                "created": time.time(),
            }
            self.board.store.insert("samplers", row, replace=True)

    def _register(self, op: SaveCheckpoint, adapter: Adapter, action: Run) -> None:
        key: VersionKey = (adapter.adapter_id, adapter.version)
        sampler = op.kind == "sampler_weights"
        folder = self.board.adapters.paths.version(key) if sampler else Path(action.folder or "")
        now = time.time()
        self.board.adapters.replace_checkpoint(
            {
                "path": checkpoint_path(adapter.adapter_id, op.kind, op.name),
                "adapter_id": adapter.adapter_id,
                "kind": op.kind,
                "name": op.name,
                "owner": adapter.owner,
                "info": {"folder": str(folder), "user_metadata": op.user_metadata},
                "version": adapter.version if sampler else None,
                "size": folder_size(folder),
                "created": now,
                "expires": None if op.ttl_seconds is None else now + op.ttl_seconds,
            }
        )

    def removed(self, adapter: Adapter) -> None:
        """Its row stays for the checkpoints that name it; its state is gone, its versions go when nothing pins them."""
        adapter.removed = True
        self.board.unexported.pop(adapter.adapter_id, None)
        store, paths = self.board.store, self.board.adapters.paths
        with store.transaction():
            store.write("UPDATE adapters SET removed=1, snapshot=NULL WHERE adapter_id=?", adapter.adapter_id)
            store.forget_payloads(adapter.adapter_id, adapter.executed_seq + 1)
        for folder in (adapter.snapshot, paths.peft(adapter.adapter_id) if adapter.simple else None):
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)


def _version(entry: Entry) -> VersionKey | None:
    return entry.op.version if isinstance(entry.op, Sample) else None
