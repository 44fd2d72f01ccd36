"""The messages, and what the parser refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from google.protobuf import descriptor_pb2
from tinker.proto import tinker_public_pb2

from framework.service import wire
from framework.service.ops import RequestError
from framework.service.wire_pb import FLOAT32, INT64, MESSAGES
from framework.types import Completion

LIMITS = wire.ModelLimits(vocab_size=100, max_tokens=8, max_datums=3)


def request(loss_fn: str = "cross_entropy", config: dict[str, float] | None = None, **inputs: Any) -> Any:
    """A request with one datum of three tokens."""
    message = MESSAGES["ForwardBackwardRequest"](model_id="m", seq_id=1, loss_fn=loss_fn, loss_fn_config=config or {})
    datum = message.data.add()
    for part in ([1, 2], [3]):
        datum.model_input.add().encoded_text.tokens = np.asarray(part, dtype="<i4").tobytes()
    for name, values in {"target_tokens": [2, 3, 4], **inputs}.items():
        array = np.asarray(values)
        integer = array.dtype.kind == "i"
        tensor = datum.loss_fn_inputs[name]
        tensor.dense = array.astype("<i8" if integer else "<f4").tobytes()
        tensor.dtype = INT64 if integer else FLOAT32
        tensor.shape.extend(array.shape)
    return message


def shape_of(file: descriptor_pb2.FileDescriptorProto) -> dict[str, tuple[Any, ...]]:
    """Every field with what the wire knows of it."""
    found: dict[str, tuple[Any, ...]] = {}

    def walk(message: descriptor_pb2.DescriptorProto, prefix: str) -> None:
        for field in message.field:
            found[f"{prefix}{message.name}.{field.name}"] = (field.number, field.type, field.label, field.type_name)
        for nested in message.nested_type:
            walk(nested, f"{prefix}{message.name}.")

    for message in file.message_type:
        walk(message, "")
    return found


def test_every_field_has_the_number_and_type_of_the_sdks() -> None:
    mine, other = descriptor_pb2.FileDescriptorProto(), descriptor_pb2.FileDescriptorProto()
    MESSAGES["Tensor"].DESCRIPTOR.file.CopyToProto(mine)
    tinker_public_pb2.DESCRIPTOR.CopyToProto(other)
    known, wanted = shape_of(mine), shape_of(other)
    assert len(known) > 50
    assert {name: wanted[name] for name in known} == known


def test_a_batch_is_not_shifted_and_every_position_is_scored() -> None:
    batch = wire.train_batch(request(weights=[0.0, 1.0, -2.0]), LIMITS)
    [example] = batch.examples
    assert example.input_ids.tolist() == [1, 2, 3]
    assert example.scored.tolist() == [0, 1, 2]
    assert example.target_ids.tolist() == [2, 3, 4]
    assert example.weights.tolist() == [0.0, 1.0, -2.0]
    assert batch.shapes == ((3,),)


def test_rl_inputs_become_fields_and_defaults_fill_the_config() -> None:
    message = request("ppo", {"clip_low_threshold": 0.5}, logprobs=[-1.0, -2.0, -3.0], advantages=[0.0, 1.0, 2.0])
    batch = wire.train_batch(message, LIMITS)
    assert batch.loss.fields == ("advantages", "sampling_logprobs")
    assert batch.examples[0].fields["sampling_logprobs"].tolist() == [-1.0, -2.0, -3.0]
    assert batch.examples[0].weights.tolist() == [1.0, 1.0, 1.0]


def test_a_sparse_tensor_is_the_dense_one() -> None:
    message = request(target_tokens=[[5, 0], [0, 6], [0, 0]])
    weights = message.data[0].loss_fn_inputs["weights"]
    weights.sparse_csr.values = np.asarray([0.5, 0.25], dtype="<f4").tobytes()
    weights.sparse_csr.crow_indices = np.asarray([0, 1, 2, 2], dtype="<i8").tobytes()
    weights.sparse_csr.col_indices = np.asarray([0, 1], dtype="<i8").tobytes()
    weights.dtype = FLOAT32
    weights.shape.extend([3, 2])
    batch = wire.train_batch(message, LIMITS)
    assert batch.shapes == ((3, 2),)
    assert batch.examples[0].scored.tolist() == [0, 0, 1, 1, 2, 2]
    assert batch.examples[0].weights.tolist() == [0.5, 0.0, 0.0, 0.25, 0.0, 0.0]
    weights.sparse_csr.col_indices = np.asarray([0, 7], dtype="<i8").tobytes()
    with pytest.raises(RequestError, match="col_indices are out of range"):
        wire.train_batch(message, LIMITS)


@pytest.mark.parametrize(
    ("message", "complaint"),
    [
        (request("nothing"), "loss_fn='nothing' is not supported"),
        (request("ppo"), "missing"),
        (request(advantages=[1.0, 1.0, 1.0]), "unknown"),
        (request(config={"beta": 1.0}), "loss_fn_config keys"),
        (request(target_tokens=[2, 3, 100]), r"must lie in \[0, 100\)"),
        (request(target_tokens=[2, 3]), "has shape"),
        (request(target_tokens=[2.0, 3.0, 4.0]), "must be int64"),
        (request(weights=[1.0, float("nan"), 1.0]), "not finite"),
        (request(weights=[1.0, 1.0]), "weights has shape"),
    ],
)
def test_what_is_wrong_is_named(message: Any, complaint: str) -> None:
    with pytest.raises(RequestError, match=complaint):
        wire.train_batch(message, LIMITS)


def test_images_and_long_sequences_are_refused() -> None:
    message = request()
    message.data[0].model_input.add().image.data = b"x"
    with pytest.raises(RequestError, match="image chunk"):
        wire.train_batch(message, LIMITS)
    long = request()
    long.data[0].model_input[0].encoded_text.tokens = np.zeros(20, dtype="<i4").tobytes()
    with pytest.raises(RequestError, match="21 tokens; allowed are 1 to 8"):
        wire.train_batch(long, LIMITS)
    for body in (b"\xff\xff", MESSAGES["ForwardBackwardRequest"](model_id="m").SerializeToString()):
        with pytest.raises(RequestError):
            wire.parse_request(body)


def test_outputs_are_runs_of_equal_shape() -> None:
    rows = [np.asarray([1.0, 2.0]), np.asarray([3.0]), np.asarray([4.0, 5.0, 6.0, 7.0])]
    body = wire.forward_backward_output(rows, [(2,), (1,), (2, 2)], {"loss:sum": 1.5})
    output = MESSAGES["ForwardBackwardOutput"].FromString(body)
    assert [record.num_datums for record in output.loss_fn_outputs] == [2, 1]
    field = output.loss_fn_outputs[0].fields["logprobs"]
    assert np.frombuffer(field.offsets, dtype="<i8").tolist() == [0, 8, 12]
    assert np.frombuffer(field.data, dtype="<f4").tolist() == [1.0, 2.0, 3.0]
    assert list(output.loss_fn_outputs[1].fields["logprobs"].trailing_shape) == [2]


def test_prompt_logprobs_beyond_the_last_n_are_blank() -> None:
    completion = Completion(
        token_ids=(7,),
        sampling_logprobs=(-0.5,),
        stop_reason="stop",
        adapter=None,
        prompt_logprobs=(None, -1.0, -2.0),
        top_prompt_logprobs=((), ((3, -1.0),), ((4, -2.0), (5, -3.0))),
    )
    body = wire.sample_response([completion], top_k=0, top_prompt_k=2, last_n=1)
    response = MESSAGES["SampleResponse"].FromString(body)
    values = np.frombuffer(response.prompt_logprobs, dtype="<f4")
    assert np.isnan(values).tolist() == [True, True, False]
    top = np.frombuffer(response.topk_prompt_logprobs.token_ids, dtype="<i4").reshape(3, 2)
    assert top.tolist() == [[0, 0], [0, 0], [4, 5]]
