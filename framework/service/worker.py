"""Executes plan actions on this rank's trainer and engine. Every rank runs the same actions in the same order."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from framework.algorithms.base import LossFn, LossInputs
from framework.batching import Batch, Microbatch, pack
from framework.engine.base import RolloutEngine, SampleRequest
from framework.errors import CheckpointError, FrameworkError
from framework.lora.peft_io import CONFIG_FILE, load_peft, save_peft
from framework.lora.spec import LoraSpec
from framework.service import tensors
from framework.service.losses import build_loss
from framework.service.ops import (
    CreateAdapter,
    LoadState,
    OptimStep,
    Publish,
    RemoveAdapter,
    RequestError,
    SaveCheckpoint,
    TrainBatch,
)
from framework.service.plan import (
    Abort,
    Action,
    Export,
    LoadVersion,
    Progress,
    Restore,
    Run,
    Snapshot,
    Submit,
    TrainedBatch,
    UnloadVersion,
    VersionKey,
)
from framework.service.writer import Writer
from framework.trainer.base import Trainer
from framework.types import AdapterRef
from framework.weight_sync import WeightSync, check_delivery, content_hash

log = logging.getLogger(__name__)
PEFT = "peft"
"""Folder of the PEFT files inside a checkpoint's."""


@dataclass(slots=True, kw_only=True)
class RunningBatch:
    """A TrainBatch between its microbatches."""

    batch: Batch
    loss_fn: LossFn
    backward: bool
    undo: dict[str, Tensor] | None
    """The adapter's state before the first microbatch; None when its gradient was zero."""
    logprobs: dict[int, npt.NDArray[np.float32]] = field(default_factory=dict)
    loss: float = 0.0
    done: int = 0


@dataclass(slots=True, kw_only=True)
class Worker:
    """One per rank."""

    trainer: Trainer
    engine: RolloutEngine
    weight_sync: WeightSync
    tp_rank: int
    writer: Writer
    base_model: str
    """For PEFT's ``base_model_name_or_path``; rank 0 writes the PEFT folders."""
    max_tokens_per_microbatch: int
    pad_to_multiple_of: int = 1
    refs: dict[VersionKey, AdapterRef] = field(default_factory=dict)
    running: dict[str, RunningBatch] = field(default_factory=dict)
    published: dict[Path, str] = field(default_factory=dict)
    """Folders of versions that were pushed in this turn, and their adapters."""
    clean: set[str] = field(default_factory=set)
    """Adapters known to have a zero gradient."""

    def execute(self, action: Action) -> Any:
        """Runs one action; raises what the trainer or engine raises."""
        handlers: dict[type, Callable[[Any], Any]] = {
            Restore: self._restore,
            Snapshot: self._snapshot,
            Export: self._export,
            LoadVersion: self._load_version,
            UnloadVersion: lambda a: self.engine.unload_adapter(self.refs[a.key]),
            Submit: self._submit,
            Abort: lambda a: self.engine.abort(a.engine_ids),
            Run: self._run,
        }
        return handlers[type(action)](action)

    def _restore(self, action: Restore) -> None:
        self.trainer.add_adapter(action.adapter_id, action.spec, seed=action.seed)
        if action.snapshot is not None:
            self.trainer.load_state_dict(action.adapter_id, tensors.read_state(Path(action.snapshot), self.tp_rank))

    def _snapshot(self, action: Snapshot) -> None:
        self._flush()
        if action.folder is not None:
            tensors.write_state(Path(action.folder), self.tp_rank, self.trainer.state_dict(action.adapter_id))
        if action.evict:
            self._forget(action.adapter_id)

    def _forget(self, name: str) -> None:
        self.trainer.remove_adapter(name)
        self.clean.discard(name)

    def _load_version(self, action: LoadVersion) -> None:
        """Back into a slot, read back and compared, as when it was pushed."""
        self._flush()
        shards = tensors.read_shards(Path(action.folder), self.tp_rank)
        ref = self.refs.get(action.key)
        if ref is None:  # it was pushed before a restart
            version = self.weight_sync.versions.next()
            ref = AdapterRef(name=action.key[0], version=version, content_hash=content_hash(shards))
        self.engine.load_adapter(ref, action.spec, shards)
        check_delivery(ref, action.spec, shards, self.engine.read_adapter(ref))
        self.refs[action.key] = ref

    def _submit(self, action: Submit) -> None:
        if action.key is not None and action.key not in self.refs:
            raise CheckpointError(f"version {action.key[1]} of {action.key[0]} could not be brought back, see the log")
        self.engine.submit(
            SampleRequest(
                request_id=action.engine_id,
                prompt=action.prompt,
                sampling=action.sampling,
                adapter=None if action.key is None else self.refs[action.key],
                stream=action.stream,
            )
        )

    def _run(self, action: Run) -> Any:
        op, name = action.op, action.adapter_id
        if op is None or isinstance(op, TrainBatch):
            return self._train(action)
        if isinstance(op, OptimStep):
            return self._optim_step(action, op)
        if isinstance(op, Publish):
            self._publish(action)
            return self._flush() if op.sampling_session_id is None else None
        if isinstance(op, SaveCheckpoint):
            return self._save(action, op)
        if isinstance(op, CreateAdapter):
            return self._create(action, op)
        if isinstance(op, LoadState):
            return self._load(action, op.optimizer)
        assert isinstance(op, RemoveAdapter), f"no rank can run {op}"
        self._flush()
        return self._forget(name)

    def _create(self, action: Run, op: CreateAdapter) -> None:
        self.trainer.add_adapter(action.adapter_id, op.spec, seed=op.seed)
        self.clean.add(action.adapter_id)
        try:
            if op.source is not None:
                self._load(action, op.optimizer)
            self._publish(action)
        except Exception:
            self._forget(action.adapter_id)
            raise

    def _optim_step(self, action: Run, op: OptimStep) -> Any:
        result = self.trainer.optim_step(action.adapter_id, op.params)
        self.clean.add(action.adapter_id)
        if not np.isfinite(result.grad_norm):
            raise RequestError("the gradient is not finite; the step was not applied")
        self._publish(action)
        return result

    def _publish(self, action: Run) -> None:
        """Pushes the weights; what the engine got is written soon. Nothing to do when they are a version already."""
        if action.publish_as is None:
            return
        assert action.folder is not None, "a new version has a folder"
        self.refs[action.publish_as] = self.weight_sync.publish(action.adapter_id)
        self.published[Path(action.folder)] = action.adapter_id

    def keep(self) -> None:
        """Copies what was published before anything can change it; its file follows. Called at the end of a turn."""
        while self.published:
            folder, name = self.published.popitem()
            copies = tensors.copied(self.trainer.adapter_shards(name))
            self.writer.put(folder, partial(tensors.write_shards, folder, self.tp_rank, copies))

    def _flush(self) -> None:
        self.keep()
        self.writer.flush()

    def _save(self, action: Run, op: SaveCheckpoint) -> None:
        if op.kind == "sampler_weights":
            self._publish(action)
            self._flush()
            return
        assert action.folder is not None, "a checkpoint has a folder"
        if op.kind == "weights":
            tensors.write_state(Path(action.folder), self.tp_rank, self.trainer.state_dict(action.adapter_id))
        whole = self.trainer.export_adapter(action.adapter_id)
        if self.tp_rank == 0:
            self._write_peft(Path(action.folder) / PEFT, self.trainer.adapters()[action.adapter_id], whole)

    def _export(self, action: Export) -> None:
        """Gathers the weights; the folder follows in the background."""
        whole = self.trainer.export_adapter(action.adapter_id)
        if self.tp_rank != 0:
            return
        folder, spec = Path(action.folder), self.trainer.adapters()[action.adapter_id]

        def write() -> None:
            try:
                self._write_peft(folder, spec, whole)
            except (FrameworkError, OSError):  # training does not depend on it
                log.exception("the adapter's PEFT folder could not be written", extra={"folder": str(folder)})

        self.writer.put(folder, write)

    def _write_peft(self, folder: Path, spec: LoraSpec, whole: Mapping[str, npt.NDArray[np.float32]]) -> None:
        save_peft(folder, spec=spec, tensors=whole, base_model=self.base_model, dtype=torch.float32)

    def _load(self, action: Run, optimizer: bool) -> None:
        """Weights, and if asked the optimizer, from a checkpoint; a gradient it may hold is not wanted."""
        assert action.source is not None, "a checkpoint has a folder"
        self._flush()
        folder, name = Path(action.source), action.adapter_id
        if optimizer:
            self.trainer.load_state_dict(name, tensors.read_state(folder, self.tp_rank))
        else:
            self.trainer.import_adapter(
                name, load_peft(folder if (folder / CONFIG_FILE).is_file() else folder / PEFT)[1]
            )
        self.trainer.zero_grad(name)
        self.clean.add(name)

    def _train(self, action: Run) -> Progress | TrainedBatch:
        """One microbatch. If it fails, the gradient of those before it is taken back."""
        running = self.running.get(action.request_id)
        if running is None:
            assert isinstance(action.op, TrainBatch), "the first quantum brings the batch"
            running = self.running[action.request_id] = self._begin(action.adapter_id, action.op)
        microbatch = running.batch.microbatches[running.done]
        compute = self._backward if running.backward else self._forward
        try:
            loss, logprobs = compute(action.adapter_id, microbatch, running.loss_fn)
        except Exception:
            self._undo(action, running)
            raise
        running.loss += loss
        running.done += 1
        running.logprobs.update(zip(microbatch.datum_ids, logprobs, strict=True))
        total = len(running.batch.microbatches)
        if running.done < total:
            return Progress(done=running.done, total=total)
        del self.running[action.request_id]
        ordered = tuple(running.logprobs[index] for index in range(running.batch.num_datums))
        return TrainedBatch(logprobs=ordered, loss=running.loss, metrics={})

    def _begin(self, name: str, op: TrainBatch) -> RunningBatch:
        longest = max(len(example.input_ids) for example in op.examples)
        batch = pack(
            op.examples,
            max_tokens=max(self.max_tokens_per_microbatch, longest),
            multiple_of=self.pad_to_multiple_of,
        )
        undo = None
        if op.backward:
            if len(batch.microbatches) > 1 and name not in self.clean:
                undo = self.trainer.state_dict(name)
            self.clean.discard(name)
        return RunningBatch(batch=batch, loss_fn=build_loss(op.loss), backward=op.backward, undo=undo)

    def _undo(self, action: Run, running: RunningBatch) -> None:
        del self.running[action.request_id]
        if not running.backward or not running.done:
            return
        if running.undo is None:
            self.trainer.zero_grad(action.adapter_id)
            self.clean.add(action.adapter_id)
        else:
            self.trainer.load_state_dict(action.adapter_id, running.undo)

    def _backward(
        self, name: str, microbatch: Microbatch, loss_fn: LossFn
    ) -> tuple[float, tuple[npt.NDArray[np.float32], ...]]:
        result = self.trainer.forward_backward(name, _alone(microbatch), loss_fn)
        return result.loss, result.result.logprobs

    def _forward(
        self, name: str, microbatch: Microbatch, loss_fn: LossFn
    ) -> tuple[float, tuple[npt.NDArray[np.float32], ...]]:
        """The same loss, from logprobs without gradient."""
        result = self.trainer.forward(name, _alone(microbatch))
        output = loss_fn(
            LossInputs(
                logprobs=torch.from_numpy(np.concatenate(result.logprobs)),
                entropy=torch.from_numpy(np.concatenate(result.entropy)),
                weights=microbatch.weights,
                sequence_ids=microbatch.sequence_ids,
                num_sequences=microbatch.num_sequences,
                fields=microbatch.fields,
            )
        )
        return float((output.per_token * microbatch.weights).sum()), result.logprobs


def _alone(microbatch: Microbatch) -> Batch:
    """The microbatch as a batch of its own, its datums numbered from 0."""
    count = microbatch.num_sequences
    return Batch(microbatches=(replace(microbatch, datum_ids=tuple(range(count))),), num_datums=count)
