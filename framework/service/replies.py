"""Results to what the client receives, by the kind of request. Kinds are stored with requests, so names are stable."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from framework.service import wire
from framework.service.adapters import checkpoint_path
from framework.service.ops import OptimStep, Outcome, Publish, Sample, SaveCheckpoint, TrainBatch
from framework.service.plan import TrainedBatch
from framework.service.scheduler import Entry
from framework.trainer.base import OptimResult
from framework.types import Completion


def json_outcome(value: Mapping[str, Any], *, failed: bool = False) -> Outcome:
    """A JSON answer; NaN and infinities are our bug, as they would end the client."""
    return Outcome(body=json.dumps(value, allow_nan=False).encode(), content_type=wire.JSON, failed=failed)


def failure_reply(message: str, category: str) -> Outcome:
    """How the protocol tells of failed work: HTTP 200 with an ``error``."""
    return json_outcome({"error": message, "category": category}, failed=True)


def reply(entry: Entry, result: Any) -> Outcome:
    """The outcome of a request that went well."""
    return REPLIES[entry.kind](entry, result)


def _created(entry: Entry, result: None) -> Outcome:
    return json_outcome({"type": "create_model", "model_id": entry.adapter_id})


def _trained(entry: Entry, result: TrainedBatch) -> Outcome:
    assert isinstance(entry.op, TrainBatch)
    body = wire.forward_backward_output(result.logprobs, entry.op.shapes, {"loss:sum": result.loss, **result.metrics})
    return Outcome(body=body, content_type=wire.PROTOBUF)


def _stepped(entry: Entry, result: OptimResult) -> Outcome:
    assert isinstance(entry.op, OptimStep)
    norm = result.grad_norm if math.isfinite(result.grad_norm) else 0.0
    return json_outcome({"metrics": {"grad_norm:mean": norm, "step:max": float(result.step)}})


def _saved(entry: Entry, result: None) -> Outcome:
    op = entry.op
    if isinstance(op, Publish):
        return json_outcome({"type": entry.kind, "path": None, "sampling_session_id": op.sampling_session_id})
    assert isinstance(op, SaveCheckpoint)
    assert entry.adapter_id is not None
    return json_outcome({"type": entry.kind, "path": checkpoint_path(entry.adapter_id, op.kind, op.name)})


def _loaded(entry: Entry, result: None) -> Outcome:
    op: Any = entry.op
    return json_outcome({"type": "load_weights", "path": op.source, "model_id": entry.adapter_id})


def _sampled(entry: Entry, result: tuple[Completion, ...]) -> Outcome:
    op = entry.op
    assert isinstance(op, Sample)
    body = wire.sample_response(
        result,
        top_k=op.sampling.top_logprobs,
        top_prompt_k=op.sampling.top_prompt_logprobs,
        last_n=op.prompt_logprobs_last_n,
    )
    return Outcome(body=body, content_type=wire.PROTOBUF)


def _simple_created(entry: Entry, result: None) -> Outcome:
    return json_outcome({"model_id": entry.adapter_id})


def _simple_trained(entry: Entry, result: TrainedBatch) -> Outcome:
    logprobs = [[round(float(value), 6) for value in values] for values in result.logprobs]
    return json_outcome({"model_id": entry.adapter_id, "loss": result.loss, "logprobs": logprobs})


def _simple_stepped(entry: Entry, result: OptimResult) -> Outcome:
    return json_outcome({"model_id": entry.adapter_id, "step": result.step, "grad_norm": result.grad_norm})


def _direct(entry: Entry, result: Any) -> Outcome:
    return Outcome(body=b"", content_type="", value=result if result is not None else True)


REPLIES: dict[str, Callable[[Entry, Any], Outcome]] = {
    "create_model": _created,
    "forward_backward": _trained,
    "optim_step": _stepped,
    "save_weights": _saved,
    "save_weights_for_sampler": _saved,
    "save_weights_external": _saved,
    "load_weights": _loaded,
    "sample": _sampled,
    "direct": _direct,
    "simple.create_model": _simple_created,
    "simple.forward_backward": _simple_trained,
    "simple.optim_step": _simple_stepped,
    "simple.remove": _simple_created,
}
