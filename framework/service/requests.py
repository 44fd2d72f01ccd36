"""Bodies of requests to ops, by kind. Used when a request arrives and again when it is replayed after a restart.

A parser sees only the stored bytes and the limits, so that a replay makes the same op.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from framework.lora.spec import TARGETS, LoraSpec
from framework.service import wire
from framework.service.adapters import NAME, split_path
from framework.service.ops import (
    AdapterOp,
    CheckpointKind,
    CreateAdapter,
    LoadState,
    OptimStep,
    Publish,
    RemoveAdapter,
    RequestError,
    Sample,
    SaveCheckpoint,
    TrainBatch,
)
from framework.types import AdamParams, Prompt, SamplingParams

ATTENTION, MLP = TARGETS[:4], TARGETS[4:]
MIN_TTL_S, MAX_TTL_S = 3600, 10 * 365 * 86400


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestLimits:
    """What one request may ask for."""

    model: wire.ModelLimits
    max_rank: int
    tokenizer: Any
    """A transformers tokenizer, for the requests that speak text."""
    max_samples: int = 128
    max_top_logprobs: int = 20
    default_alpha: float = 32.0
    """The protocol carries no alpha; the SDK's users assume 32."""


def parse(kind: str, payload: bytes, limits: RequestLimits) -> AdapterOp:
    """The op of an adapter's request.

    Raises:
        RequestError: what is wrong with it.
    """
    return _PARSERS[kind](payload, limits)


def body_json(payload: bytes) -> dict[str, Any]:
    """The body as a JSON object.

    Raises:
        RequestError: it is not one.
    """
    try:
        value = json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise RequestError("the body must be a JSON object")
    return value


def number(body: Mapping[str, Any], key: str, default: float, low: float, high: float) -> float:
    """A finite number in [low, high]; missing or null is the default."""
    value = body.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise RequestError(f"{key}={value!r}: must be a number from {low:g} to {high:g}")
    return float(value)


def integer(body: Mapping[str, Any], key: str, default: int, low: int, high: int) -> int:
    """Likewise, a whole number."""
    value = body.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise RequestError(f"{key}={value!r}: must be an integer from {low} to {high}")
    return value


def lora_spec(config: Mapping[str, Any], limits: RequestLimits) -> LoraSpec:
    """Of the protocol's LoraConfig. ``train_unembed`` is not trained: the sampler could not apply it."""
    rank = integer(config, "rank", 32, 1, limits.max_rank)
    targets = (ATTENTION if config.get("train_attn", True) else ()) + (MLP if config.get("train_mlp", True) else ())
    if not targets:
        raise RequestError("one of lora_config.train_attn and train_mlp must be true")
    return LoraSpec(rank=rank, alpha=limits.default_alpha, targets=targets)


def _create_model(payload: bytes, limits: RequestLimits) -> CreateAdapter:
    body = body_json(payload)
    optimizer = body.get("optimizer_config") or {"type": "adamw"}
    if optimizer.get("type", "adamw") != "adamw":
        raise RequestError(f"optimizer_config.type={optimizer.get('type')!r}: only adamw is supported")
    config = body.get("lora_config") or {}
    return CreateAdapter(spec=lora_spec(config, limits), seed=_seed(config, payload))


def _seed(config: Mapping[str, Any], payload: bytes) -> int:
    """The caller's seed, or one that follows from the request, which is never the same twice."""
    derived = int.from_bytes(hashlib.blake2b(payload, digest_size=4).digest(), "big") >> 1
    return integer(config, "seed", derived, -(1 << 63), (1 << 63) - 1) % (1 << 31)


def _forward_backward(payload: bytes, limits: RequestLimits) -> AdapterOp:
    return wire.train_batch(wire.parse_request(payload), limits.model)


def _optim_step(payload: bytes, limits: RequestLimits) -> OptimStep:
    body = body_json(payload)
    params = body.get("adam_params")
    if params is None:
        other = (body.get("optimizer_params") or {}).get("type")
        raise RequestError(f"adam_params are required; an optimizer of type {other!r} is not supported")
    return OptimStep(params=adam_params(params))


def adam_params(params: Mapping[str, Any]) -> AdamParams:
    """The protocol's AdamParams with its defaults."""
    return AdamParams(
        learning_rate=number(params, "learning_rate", 1e-4, 0.0, 1e3),
        beta1=number(params, "beta1", 0.9, 0.0, 0.9999999),
        beta2=number(params, "beta2", 0.95, 0.0, 0.9999999),
        eps=number(params, "eps", 1e-12, 0.0, 1e12),
        weight_decay=number(params, "weight_decay", 0.0, 0.0, 1e3),
        max_grad_norm=number(params, "grad_clip_norm", 0.0, 0.0, 1e12),
    )


def _save(kind: CheckpointKind) -> Callable[[bytes, RequestLimits], SaveCheckpoint | Publish]:
    def parser(payload: bytes, limits: RequestLimits) -> SaveCheckpoint | Publish:
        body = body_json(payload)
        name = body.get("path")
        if name is None and kind == "sampler_weights":
            number_ = integer(body, "sampling_session_seq_id", -1, 0, 1 << 62)
            session = str(body.get("model_id")).rpartition(":train:")[0]
            if number_ < 0 or not session:
                raise RequestError("path or sampling_session_seq_id is required")
            return Publish(sampling_session_id=f"{session}:sample:{number_}")
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise RequestError(f"path={name!r}: a checkpoint's name is letters, digits, '_', '.', '-', at most 128")
        return SaveCheckpoint(
            kind=kind,
            name=name,
            overwrite=bool(body.get("overwrite", False)),
            ttl_seconds=ttl_seconds(body),
            user_metadata=body.get("user_metadata"),
        )

    return parser


def ttl_seconds(body: Mapping[str, Any]) -> int | None:
    """Null keeps for ever."""
    if body.get("ttl_seconds") is None:
        return None
    return integer(body, "ttl_seconds", 0, MIN_TTL_S, MAX_TTL_S)


def _load_weights(payload: bytes, limits: RequestLimits) -> LoadState:
    body = body_json(payload)
    path = body.get("path")
    if not isinstance(path, str):
        raise RequestError("path is required")
    split_path(path)
    return LoadState(source=path, optimizer=bool(body.get("optimizer", False)))


def _simple_batch(payload: bytes, limits: RequestLimits) -> TrainBatch:
    """The batch of the simple client; text is tokenised here, with no loss on the prompt."""
    body = body_json(payload)
    data = body["data"]
    if len(data) > limits.model.max_datums:
        raise RequestError(f"the batch has {len(data)} datums; allowed are 1 to {limits.model.max_datums}")
    datums = [_simple_datum(datum, limits.tokenizer) for datum in data]
    loss = wire.loss_spec(body.get("loss_fn", "cross_entropy"), body.get("loss_fn_config") or {}, datums[0][1])
    pairs = [
        wire.build_example(f"datum {index}", tokens, inputs, loss, limits.model)
        for index, (tokens, inputs) in enumerate(datums)
    ]
    return wire.checked_batch(pairs, loss, limits.model, backward=True)


def _simple_datum(datum: Mapping[str, Any], tokenizer: Any) -> tuple[wire.Array, dict[str, wire.Array]]:
    if datum.get("completion") is not None:
        prompt = list(tokenizer.encode(datum.get("prompt") or ""))
        tokens = prompt + list(tokenizer.encode(datum["completion"], add_special_tokens=False))
        weights = ([0.0] * max(len(prompt), 1) + [1.0] * len(tokens))[1 : len(tokens)]
        datum = {"input_ids": tokens[:-1], "target_tokens": tokens[1:], "weights": weights}
    inputs = {
        key: np.asarray(values, dtype=np.int64 if key == "target_tokens" else np.float32)
        for key, values in datum.items()
        if values is not None and key not in ("input_ids", "prompt", "completion")
    }
    return np.asarray(datum["input_ids"], dtype=np.int64), inputs


def _simple_step(payload: bytes, limits: RequestLimits) -> OptimStep:
    return OptimStep(params=adam_params(body_json(payload)))


_PARSERS: dict[str, Callable[[bytes, RequestLimits], AdapterOp]] = {
    "create_model": _create_model,
    "forward_backward": _forward_backward,
    "optim_step": _optim_step,
    "save_weights": _save("weights"),
    "save_weights_for_sampler": _save("sampler_weights"),
    "save_weights_external": _save("external_weights"),
    "load_weights": _load_weights,
    "simple.forward_backward": _simple_batch,
    "simple.optim_step": _simple_step,
    "simple.remove": lambda payload, limits: RemoveAdapter(),
}


def parse_sample(body: Mapping[str, Any], version: tuple[str, int] | None, limits: RequestLimits) -> Sample:
    """The protocol's SampleRequest.

    Raises:
        RequestError: an option that is not supported, an empty or over-long prompt, a token outside the vocabulary.
    """
    for key in ("target_prompt_logprobs", "prompt_alt_tokens_k"):
        if body.get(key):
            raise RequestError(f"{key} is not supported by this server")
    tokens = _prompt_tokens(body.get("prompt"))
    room = wire.check_tokens("prompt", tokens, limits.model)
    if not room:
        raise RequestError(f"the prompt fills the context of {limits.model.max_tokens} tokens")
    last_n = body.get("prompt_logprobs_last_n")
    params = body.get("sampling_params") or {}
    top_prompt = integer(body, "topk_prompt_logprobs", 0, 0, limits.max_top_logprobs)
    sampling = SamplingParams(
        max_tokens=min(integer(params, "max_tokens", room, 1, 1 << 31), room),
        temperature=number(params, "temperature", 1.0, 0.0, 100.0),
        top_p=number(params, "top_p", 1.0, 1e-9, 1.0),
        top_k=integer(params, "top_k", -1, -1, 1 << 31),
        seed=None if params.get("seed") is None else integer(params, "seed", 0, -(1 << 63), (1 << 63) - 1) % (1 << 31),
        **stop_params(params.get("stop")),
        prompt_logprobs=bool(body.get("prompt_logprobs")) or top_prompt > 0,
        top_logprobs=integer(body, "topk_sample_logprobs", 0, 0, limits.max_top_logprobs),
        top_prompt_logprobs=top_prompt,
    )
    return Sample(
        prompt=Prompt(token_ids=tuple(tokens)),
        sampling=sampling,
        num_samples=integer(body, "num_samples", 1, 1, limits.max_samples),
        version=version,
        prompt_logprobs_last_n=None if last_n is None else integer(body, "prompt_logprobs_last_n", 1, 1, len(tokens)),
    )


def stop_params(stop: Any) -> dict[str, Any]:
    """None stops at the end token, an empty list never does, else strings or tokens in addition to it."""
    if stop is None:
        return {}
    values = [stop] if isinstance(stop, str) else stop
    if not isinstance(values, list) or len(values) > 64:
        raise RequestError("stop must be a string, or a list of at most 64 strings or token ids")
    if not values:
        return {"ignore_eos": True}
    if all(isinstance(value, str) and 0 < len(value) <= 256 for value in values):
        return {"stop": tuple(values)}
    if all(isinstance(value, int) and not isinstance(value, bool) for value in values):
        return {"stop_token_ids": tuple(values)}
    raise RequestError("stop must hold only non-empty strings, or only token ids")


def _prompt_tokens(prompt: Any) -> list[int]:
    chunks = prompt.get("chunks") if isinstance(prompt, dict) else None
    if not isinstance(chunks, list):
        raise RequestError("prompt.chunks is required")
    tokens: list[int] = []
    for chunk in chunks:
        if not isinstance(chunk, dict) or chunk.get("type", "encoded_text") != "encoded_text":
            raise RequestError("the prompt has a chunk that is not text; this server takes text only")
        part = chunk.get("tokens")
        if not isinstance(part, list) or not all(isinstance(t, int) and not isinstance(t, bool) for t in part):
            raise RequestError("prompt.chunks[].tokens must be a list of integers")
        tokens.extend(part)
    return tokens
