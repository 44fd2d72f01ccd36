"""What a decode step records is what vLLM's own functions record, field by field."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from vllm import SamplingParams
from vllm.v1.engine.logprobs import LogprobsProcessor
from vllm.v1.outputs import LogprobsLists

from framework.engine.vllm import decode_records
from framework.engine.vllm.decode_records import in_use, sampled_alone

ORIGINAL = decode_records._original(LogprobsProcessor, "_update_sample_logprobs")


def processor(*, logprobs: int, flat: bool) -> Any:
    class Request:
        sampling_params = SamplingParams(logprobs=logprobs, flat_logprobs=flat)

    return LogprobsProcessor.from_new_request(None, Request())


def lists(step: int, *, positions: int, columns: int) -> LogprobsLists:
    generator = np.random.default_rng(step)
    return LogprobsLists(
        generator.integers(0, 1000, (positions, columns), dtype=np.int32),
        generator.normal(size=(positions, columns)).astype(np.float32),
        generator.integers(1, 9, positions, dtype=np.int32),
    )


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize(("logprobs", "columns"), [(0, 1), (0, 4), (3, 4)])
def test_a_requests_logprobs_are_vllms(logprobs: int, columns: int, flat: bool) -> None:
    """Also where another request of the batch wants more of them (``columns``), and for several tokens at once."""
    ours, theirs = (processor(logprobs=logprobs, flat=flat) for _ in range(2))
    record = sampled_alone(ORIGINAL)
    for step in range(5):
        record(ours, lists(step, positions=1 + step % 2, columns=columns))
        ORIGINAL(theirs, lists(step, positions=1 + step % 2, columns=columns))
    if columns == 4 and logprobs == 0:  # vLLM's keeps the others' columns too: ranks end after the sampled one
        assert [list(p)[:1] for p in theirs.logprobs] == [list(p)[:1] for p in ours.logprobs]
        assert ours.cumulative_logprob == theirs.cumulative_logprob
        return
    assert ours == theirs


def test_adapters_in_use_are_a_set_without_none() -> None:
    first, second = object(), object()
    request_of = {"a": first, "b": second, "c": first}
    assert in_use(request_of, ["a", "b", "c", "base"]) == {first, second}
    assert in_use(request_of, ["base"]) == set()
