"""Bytes of the tinker protocol to ops, and results to bytes. Nothing else knows the message classes.

Parsing takes the limits it checks against; the first thing wrong is a RequestError whose text names the datum.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import isfinite
from typing import Any

import numpy as np
import numpy.typing as npt

from framework.algorithms.tinker import tinker_loss
from framework.batching import Example
from framework.errors import ConfigError
from framework.service.ops import LossSpec, RequestError, TrainBatch
from framework.service.wire_pb import DTYPES, FLOAT32, MESSAGES, STOP_REASONS
from framework.types import Completion, TopLogprobs

PROTOBUF = "application/x-protobuf"
JSON = "application/json"
WIRE_TO_FIELD = {"logprobs": "sampling_logprobs"}
"""Inputs that have another name inside the house."""
Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelLimits:
    """What a batch or prompt may hold."""

    vocab_size: int
    max_tokens: int
    """Context length of one sequence."""
    max_datums: int = 4096
    max_batch_tokens: int = 1 << 20
    max_scored: int = 1 << 22
    """(position, target) pairs of one request; soft targets count each of their K."""


def parse_request(body: bytes) -> Any:
    """The ForwardBackwardRequest message.

    Raises:
        RequestError: the bytes are not one, or carry no model or sequence number.
    """
    try:
        message = MESSAGES["ForwardBackwardRequest"].FromString(body)
    except Exception as error:  # protobuf's DecodeError class differs between its implementations
        raise RequestError(f"the body is not a ForwardBackwardRequest: {error}") from error
    if not message.model_id or message.seq_id < 1:
        raise RequestError("model_id and a seq_id of at least 1 are required")
    return message


def train_batch(message: Any, limits: ModelLimits) -> TrainBatch:
    """Checks a ForwardBackwardRequest and shapes it for the trainer. Nothing is shifted: the caller did.

    Raises:
        RequestError: naming the datum and what is wrong with it.
    """
    config = message.loss_fn_config
    if message.loss_fn_config_v2:
        config = {key: getattr(v, v.WhichOneof("value") or "number") for key, v in message.loss_fn_config_v2.items()}
    if not 1 <= len(message.data) <= limits.max_datums:
        raise RequestError(f"the batch has {len(message.data)} datums; allowed are 1 to {limits.max_datums}")
    loss = loss_spec(message.loss_fn, dict(config), message.data[0].loss_fn_inputs)
    pairs = [_example(index, datum, loss, limits) for index, datum in enumerate(message.data)]
    return checked_batch(pairs, loss, limits, backward=not message.forward_only)


def checked_batch(
    pairs: Sequence[tuple[Example, tuple[int, ...]]], loss: LossSpec, limits: ModelLimits, *, backward: bool
) -> TrainBatch:
    """The batch, if it is not too large as a whole."""
    total = sum(len(example.input_ids) for example, _ in pairs)
    scored = sum(len(example.scored) for example, _ in pairs)
    if total > limits.max_batch_tokens or scored > limits.max_scored:
        raise RequestError(
            f"the batch has {total} tokens and {scored} targets; allowed are {limits.max_batch_tokens} and "
            f"{limits.max_scored}; send smaller batches, gradients add up"
        )
    return TrainBatch(
        examples=tuple(example for example, _ in pairs),
        shapes=tuple(shape for _, shape in pairs),
        loss=loss,
        backward=backward,
    )


def loss_spec(name: str, config: Mapping[str, float | str], inputs: Collection[str]) -> LossSpec:
    """The loss of a batch whose datums have these inputs.

    Raises:
        RequestError: the loss is unknown, an input or key is missing or unknown, or a value is not allowed.
    """
    numbers = {key: value for key, value in config.items() if not isinstance(value, str) and isfinite(value)}
    if len(numbers) < len(config):
        raise RequestError(f"loss_fn_config={dict(config)}: every value must be a finite number")
    given = frozenset(WIRE_TO_FIELD.get(key, key) for key in inputs) - {"target_tokens"}
    try:
        tinker_loss(name, fields=given, config=numbers)
    except ConfigError as error:
        raise RequestError(str(error)) from error
    return LossSpec(name=name, fields=tuple(sorted(given - {"weights"})), config=numbers)


def _example(index: int, datum: Any, loss: LossSpec, limits: ModelLimits) -> tuple[Example, tuple[int, ...]]:
    tokens = chunk_tokens(datum.model_input, f"datum {index}")
    inputs = {name: _tensor(f"datum {index}: {name}", tensor) for name, tensor in datum.loss_fn_inputs.items()}
    return build_example(f"datum {index}", tokens, inputs, loss, limits)


def build_example(
    where: str, tokens: Array, inputs: Mapping[str, Array], loss: LossSpec, limits: ModelLimits
) -> tuple[Example, tuple[int, ...]]:
    """One datum with the inputs its loss needs, as (position, target) pairs; soft targets repeat a position K times.

    Args:
        where: begins every message.
        tokens: ``[N]`` input tokens.
        inputs: ``target_tokens`` ``[N]`` or ``[N, K]`` and the loss's other inputs, shaped alike.
        loss: of the batch.
        limits: of the model.

    Returns:
        The example and the shape of its logprobs.
    """
    check_tokens(where, tokens, limits)
    inputs = {WIRE_TO_FIELD.get(key, key): value for key, value in inputs.items()}
    expected = {"target_tokens", *loss.fields}
    if "target_tokens" not in inputs or set(inputs) - {"weights"} != expected:
        raise RequestError(f"{where}: has inputs {sorted(inputs)}; this batch's {loss.name} needs {sorted(expected)}")
    targets = inputs["target_tokens"]
    shape = targets.shape
    soft = targets.ndim == 2 and loss.name == "cross_entropy"
    if shape[:1] != tokens.shape or not (targets.ndim == 1 or soft) or not targets.size:
        raise RequestError(f"{where}: target_tokens has shape {list(shape)} for {len(tokens)} input tokens")
    if targets.dtype.kind != "i":
        raise RequestError(f"{where}: target_tokens must be int64, not {targets.dtype}")
    if targets.min() < 0 or targets.max() >= limits.vocab_size:
        raise RequestError(f"{where}: target_tokens must lie in [0, {limits.vocab_size})")
    fields = {}
    for name, values in inputs.items():
        if name == "target_tokens":
            continue
        if values.shape != shape:
            raise RequestError(f"{where}: {name} has shape {list(values.shape)}, target_tokens {list(shape)}")
        fields[name] = values.astype(np.float32).reshape(-1)
        if not np.isfinite(fields[name]).all():
            raise RequestError(f"{where}: {name} has values that are not finite")
    width = shape[1] if soft else 1
    positions = np.repeat(np.arange(len(tokens), dtype=np.int64), width)
    weights = fields.pop("weights", None)
    example = Example(
        input_ids=tokens.astype(np.int64),
        scored=positions,
        target_ids=targets.astype(np.int64).reshape(-1),
        weights=np.ones(len(positions), dtype=np.float32) if weights is None else weights,
        fields=fields,
    )
    return example, shape


def check_tokens(where: str, tokens: Array | Sequence[int], limits: ModelLimits) -> int:
    """How many tokens fit behind these.

    Raises:
        RequestError: there is no token, there are too many, or one is outside the vocabulary.
    """
    if not 1 <= len(tokens) <= limits.max_tokens:
        raise RequestError(f"{where}: {len(tokens)} tokens; allowed are 1 to {limits.max_tokens}")
    if min(tokens) < 0 or max(tokens) >= limits.vocab_size:
        raise RequestError(f"{where}: tokens must lie in [0, {limits.vocab_size})")
    return limits.max_tokens - len(tokens)


def chunk_tokens(chunks: Sequence[Any], where: str) -> npt.NDArray[np.int32]:
    """Concatenates protobuf text chunks."""
    parts = []
    for chunk in chunks:
        kind = chunk.WhichOneof("chunk")
        if kind != "encoded_text":
            raise RequestError(f"{where}: a {kind or 'empty'} chunk; this server takes text only")
        if len(chunk.encoded_text.tokens) % 4:
            raise RequestError(f"{where}: the token bytes are not whole int32 values")
        parts.append(np.frombuffer(chunk.encoded_text.tokens, dtype="<i4"))
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)


def _tensor(where: str, tensor: Any) -> Array:
    """A dense or CSR tensor as a dense array; entries a CSR tensor does not list are 0."""
    if tensor.dtype not in DTYPES:
        raise RequestError(f"{where}: dtype {tensor.dtype} is not supported; use float32 or int64")
    dtype, shape = np.dtype(DTYPES[tensor.dtype]), tuple(tensor.shape)
    if any(size < 0 for size in shape) or len(shape) > 2 or int(np.prod(shape, dtype=np.float64)) > 1 << 26:
        raise RequestError(f"{where}: shape {list(shape)} is not allowed")
    try:
        if tensor.WhichOneof("encoding") == "sparse_csr":
            return _from_csr(tensor.sparse_csr, dtype, shape)
        values = np.frombuffer(tensor.dense, dtype=dtype)
        return values.reshape(shape) if shape else values
    except (ValueError, IndexError) as error:
        raise RequestError(f"{where}: the bytes do not fit shape {list(shape)}: {error}") from error


def _from_csr(csr: Any, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
    rows, columns = shape
    values = np.frombuffer(csr.values, dtype=dtype)
    offsets = np.frombuffer(csr.crow_indices, dtype="<i8")
    indices = np.frombuffer(csr.col_indices, dtype="<i8")
    if len(offsets) != rows + 1 or offsets[0] != 0 or offsets[-1] != len(values) or (np.diff(offsets) < 0).any():
        raise ValueError("crow_indices are not row offsets")
    if len(indices) != len(values) or ((indices < 0) | (indices >= columns)).any():
        raise ValueError("col_indices are out of range")
    dense = np.zeros(shape, dtype=dtype)
    dense[np.repeat(np.arange(rows), np.diff(offsets)), indices] = values
    return dense


def forward_backward_output(
    logprobs: Sequence[npt.NDArray[np.float32]], shapes: Sequence[tuple[int, ...]], metrics: Mapping[str, float]
) -> bytes:
    """ForwardBackwardOutput: one ArrayRecord per run of datums whose logprobs have the same trailing shape."""
    output = MESSAGES["ForwardBackwardOutput"](loss_fn_output_type="ArrayRecord", metrics=metrics)
    for trailing, run in groupby(zip(logprobs, shapes, strict=True), key=lambda pair: pair[1][1:]):
        arrays = [np.ascontiguousarray(array, dtype="<f4") for array, _ in run]
        record = output.loss_fn_outputs.add(num_datums=len(arrays))
        field = record.fields["logprobs"]
        field.data = b"".join(array.tobytes() for array in arrays)
        field.offsets = np.cumsum([0, *(array.nbytes for array in arrays)]).astype("<i8").tobytes()
        field.dtype = FLOAT32
        field.trailing_shape.extend(trailing)
    return bytes(output.SerializeToString())


def sample_response(completions: Sequence[Completion], *, top_k: int, top_prompt_k: int, last_n: int | None) -> bytes:
    """SampleResponse of one prompt's completions; ``last_n`` blanks all but that many of the last prompt logprobs."""
    response = MESSAGES["SampleResponse"]()
    for completion in completions:
        sequence = response.sequences.add(
            stop_reason=STOP_REASONS[completion.stop_reason],
            tokens=np.asarray(completion.token_ids, dtype="<i4").tobytes(),
            logprobs=np.asarray(completion.sampling_logprobs, dtype="<f4").tobytes(),
        )
        if top_k and completion.top_logprobs is not None:
            _fill_topk(sequence.topk_sampled_logprobs, completion.top_logprobs, top_k)
    first = completions[0]
    blank = 0 if last_n is None or first.prompt_logprobs is None else len(first.prompt_logprobs) - last_n
    if first.prompt_logprobs is not None:
        values = [
            np.nan if value is None or position < blank else value
            for position, value in enumerate(first.prompt_logprobs)
        ]
        response.prompt_logprobs = np.asarray(values, dtype="<f4").tobytes()
    if top_prompt_k and first.top_prompt_logprobs is not None:
        rows = tuple(() if row < blank else pairs for row, pairs in enumerate(first.top_prompt_logprobs))
        _fill_topk(response.topk_prompt_logprobs, rows, top_prompt_k)
    return bytes(response.SerializeToString())


def _fill_topk(message: Any, rows: TopLogprobs, k: int) -> None:
    """Row-major ``[length, k]``; missing alternatives are token 0 with logprob -99999."""
    tokens = np.zeros((len(rows), k), dtype="<i4")
    logprobs = np.full((len(rows), k), -99999.0, dtype="<f4")
    for row, alternatives in enumerate(rows):
        for column, (token, logprob) in enumerate(alternatives[:k]):
            tokens[row, column], logprobs[row, column] = token, logprob
    message.token_ids, message.logprobs = tokens.tobytes(), logprobs.tobytes()
    message.k, message.length = k, len(rows)
