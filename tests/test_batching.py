"""Shift, weights and packing, by hand on sequences small enough to read."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch

from framework.algorithms.base import Aggregation
from framework.batching import Batch, Example, Microbatch, aggregate, make_batch, may_train, pack, shift
from framework.errors import ConfigError, StaleSampleError
from framework.types import AdapterRef, Datum

AGGREGATIONS: tuple[Aggregation, ...] = ("token_mean", "sequence_mean", "constant", "sum")


def datum(tokens: Sequence[int], mask: str, **fields: tuple[float, ...]) -> Datum:
    """``mask`` has an x where the token is trained on."""
    return Datum(token_ids=tuple(tokens), loss_mask=tuple(m == "x" for m in mask), fields=fields)


def test_shift_predicts_each_token_from_those_before_it() -> None:
    example = shift(datum([10, 11, 12, 13, 14], "..x.x", advantages=(0.0, 1.0, 2.0, 3.0, 4.0)))
    assert example.input_ids.tolist() == [10, 11, 12, 13]
    assert example.scored.tolist() == [1, 3]
    assert example.target_ids.tolist() == [12, 14]
    assert example.weights.tolist() == [1.0, 1.0]
    assert example.fields["advantages"].tolist() == [2.0, 4.0]


def test_shift_of_a_datum_with_nothing_to_train_on() -> None:
    example = shift(datum([1, 2, 3], "...", advantages=(1.0, 1.0, 1.0)))
    assert example.input_ids.tolist() == [1, 2]
    assert len(example.scored) == len(example.target_ids) == len(example.fields["advantages"]) == 0


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (datum([1], "."), "at least 2 tokens to predict one, this one has 1"),
        (datum([], ""), "this one has 0"),
        (datum([1, 2], "xx"), r"loss_mask\[0\] is True"),
        (datum([1, 2, 3], ".x"), "datum.loss_mask has 2 entries for 3 tokens"),
        (datum([1, 2, 3], "..x", advantages=(1.0,)), "datum.advantages has 1 entries for 3 tokens"),
    ],
)
def test_shift_refuses(bad: Datum, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        shift(bad)


def lengths(*masks: str) -> list[Example]:
    """One sequence per mask; token t of sequence s is 100 s + t, its advantage 1000 s + t."""
    examples = []
    for s, mask in enumerate(masks):
        tokens = [100 * s + t for t in range(len(mask))]
        examples.append(shift(datum(tokens, mask, advantages=tuple(1000.0 * s + t for t in range(len(mask))))))
    return examples


def weights(examples: Sequence[Example], aggregation: Aggregation, **options: float) -> list[list[float]]:
    return [e.weights.tolist() for e in aggregate(examples, aggregation, **options)]  # type: ignore[arg-type]


def test_weights_of_each_aggregation_by_hand() -> None:
    """Three sequences with 3, 1 and no scored tokens: 4 tokens, 2 sequences count."""
    examples = lengths(".xxx", "..x", "...")
    assert weights(examples, "sum") == [[1.0] * 3, [1.0], []]
    assert weights(examples, "token_mean") == [[0.25] * 3, [0.25], []]
    sixth = float(np.float32(1 / 6))
    assert weights(examples, "sequence_mean") == [[sixth] * 3, [0.5], []]
    assert weights(examples, "constant", constant=8.0) == [[0.0625] * 3, [0.0625], []]


def test_aggregation_multiplies_weights_that_are_there() -> None:
    (example,) = lengths(".xx")
    scaled = Example(
        input_ids=example.input_ids,
        scored=example.scored,
        target_ids=example.target_ids,
        weights=np.array([3.0, 5.0], dtype=np.float32),
    )
    assert weights([scaled], "token_mean") == [[1.5, 2.5]]


def test_a_batch_without_scored_tokens_has_no_infinite_weights() -> None:
    for aggregation in AGGREGATIONS:
        assert weights(lengths("...", ".."), aggregation) == [[], []]


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_two_replicas_have_the_weights_of_one(aggregation: Aggregation) -> None:
    """Sequences dealt out to two replicas, whose sums are added as the data-parallel group would."""
    examples = lengths(".xxx", "..x", "...", ".x.x.x", ".xxxx", "...x")
    alone = weights(examples, aggregation, constant=8.0)
    shares = [examples[0::2], examples[1::2]]
    sums: list[float] = []

    def record(value: float) -> float:
        sums.append(value)
        return value

    for share in shares:  # what each replica would contribute
        aggregate(share, aggregation, constant=8.0, global_sum=record)
    total = sum(sums)
    for rank, share in enumerate(shares):
        got = aggregate(share, aggregation, constant=8.0, global_sum=lambda _: total)
        for example, expected in zip(got, alone[rank::2], strict=True):
            np.testing.assert_allclose(example.weights, expected, rtol=1e-7)


def tokens_of(microbatch: Microbatch) -> list[list[int]]:
    """Its input ids, by sequence."""
    offsets = microbatch.cu_seqlens.tolist()
    return [microbatch.input_ids[a:b].tolist() for a, b in pairwise(offsets)]


def test_packing_by_first_fit_longest_first() -> None:
    """Input lengths 3, 5, 2, 4, 1 in microbatches of 7: 5+2, 4+3, 1."""
    batch = pack(lengths(".xxx", ".xxxxx", ".xx", ".xxxx", ".x"), max_tokens=7)
    assert [m.datum_ids for m in batch.microbatches] == [(1, 2), (0, 3), (4,)]
    first = batch.microbatches[0]
    assert tokens_of(first) == [[100, 101, 102, 103, 104], [200, 201]]
    assert first.position_ids.tolist() == [0, 1, 2, 3, 4, 0, 1]
    assert first.cu_seqlens.dtype == torch.int32
    assert (first.max_seqlen, first.num_sequences) == (5, 2)
    assert first.scored.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert first.target_ids.tolist() == [101, 102, 103, 104, 105, 201, 202]
    assert first.sequence_ids.tolist() == [0] * 5 + [1] * 2
    assert first.fields["advantages"].tolist() == [1001, 1002, 1003, 1004, 1005, 2001, 2002]
    assert batch.num_datums == 5


def test_scored_positions_are_offset_by_the_sequences_before() -> None:
    (microbatch,) = pack(lengths("..x.x", "...", ".x.x"), max_tokens=100).microbatches
    assert microbatch.cu_seqlens.tolist() == [0, 4, 6, 9]
    assert microbatch.scored.tolist() == [1, 3, 6, 8]
    assert microbatch.target_ids.tolist() == [2, 4, 201, 203]
    assert microbatch.sequence_ids.tolist() == [0, 0, 2, 2]
    # What is scored predicts its target: the token after the position's own, in the same sequence.
    assert (microbatch.target_ids - microbatch.input_ids[microbatch.scored]).tolist() == [1] * 4


@pytest.mark.parametrize(("multiple", "padding"), [(1, 0), (2, 1), (4, 3), (5, 4), (7, 2)])
def test_padding_is_a_sequence_of_its_own_and_never_scored(multiple: int, padding: int) -> None:
    """3 + 2 tokens; padding up to the multiple."""
    (microbatch,) = pack(lengths("..xx", ".xx"), max_tokens=100, multiple_of=multiple).microbatches
    padding = -5 % multiple
    assert len(microbatch.input_ids) == len(microbatch.position_ids) == 5 + padding
    assert microbatch.cu_seqlens.tolist() == [0, 3, 5] + ([5 + padding] if padding else [])
    assert microbatch.num_sequences == 2
    assert microbatch.scored.max().item() == 4
    assert microbatch.position_ids[5:].tolist() == list(range(padding))


def test_every_datum_lands_once_and_no_microbatch_is_too_large() -> None:
    rng = np.random.default_rng(3)
    examples = lengths(*("." + "x" * int(n) for n in rng.integers(1, 60, 200)))
    batch: Batch = pack(examples, max_tokens=64)
    landed = [index for microbatch in batch.microbatches for index in microbatch.datum_ids]
    assert sorted(landed) == list(range(200))
    assert max(len(m.input_ids) for m in batch.microbatches) <= 64
    for microbatch in batch.microbatches:
        for index, tokens in zip(microbatch.datum_ids, tokens_of(microbatch), strict=True):
            assert tokens == examples[index].input_ids.tolist()
    total = sum(len(e.input_ids) for e in examples)
    assert len(batch.microbatches) <= 1.25 * total / 64  # first fit, largest first: at most 11/9 of the optimum


def test_a_sequence_as_long_as_the_budget_fits() -> None:
    (microbatch,) = pack(lengths(".xxx"), max_tokens=3).microbatches
    assert microbatch.max_seqlen == 3


def test_pack_refuses() -> None:
    with pytest.raises(ConfigError, match="the batch has no datums"):
        pack([], max_tokens=8)
    with pytest.raises(ConfigError, match=r"datum 1 has 4 tokens.*trainer.max_tokens_per_microbatch=3; raise it"):
        pack(lengths(".x", ".xxxx"), max_tokens=3)
    other = [*lengths(".x"), shift(datum([1, 2], ".x"))]
    with pytest.raises(ConfigError, match=r"datum 1 has fields \[\], datum 0 has \['advantages'\]"):
        pack(other, max_tokens=8)


def test_temperature_travels_with_the_batch() -> None:
    assert pack(lengths(".x"), max_tokens=8).temperature == 1.0
    assert pack(lengths(".x"), max_tokens=8, temperature=0.6).temperature == 0.6


def ref(version: int, *, name: str = "policy", content_hash: str = "ab") -> AdapterRef:
    return AdapterRef(name=name, version=version, content_hash=content_hash)


@pytest.mark.parametrize(
    ("sampled_by", "max_lag", "accepted"),
    [
        (ref(7), 0, True),
        (ref(6), 0, False),
        (ref(6), 1, True),
        (ref(5), 1, False),
        (ref(5), 2, True),
        (ref(8), 2, False),  # sampled by what is yet to come
        (ref(7, content_hash="cd"), 2, False),  # the same number, other weights
        (ref(6, content_hash="cd"), 1, True),
        (ref(7, name="other"), 2, False),
        (None, 2, False),
    ],
)
def test_a_sample_may_lag_so_far_and_no_further(sampled_by: AdapterRef | None, max_lag: int, accepted: bool) -> None:
    assert may_train(sampled_by, ref(7), max_lag) is accepted


def test_the_refusal_of_a_stale_sample_names_both_versions_with_their_hashes() -> None:
    good = Datum(token_ids=(1, 2), loss_mask=(False, True), adapter=ref(6, content_hash="66"))
    stale = Datum(token_ids=(1, 2), loss_mask=(False, True), adapter=ref(5, content_hash="55"))
    options = {"aggregation": "token_mean", "max_tokens": 8, "version": ref(7, content_hash="77"), "max_lag": 1}
    assert make_batch([good], **options).num_datums == 1  # type: ignore[arg-type]
    message = (
        r"datum 1 was sampled by policy@5 \(55\), the trainer is at policy@7 \(77\) .* rollout\.max_lag=1 versions"
    )
    with pytest.raises(StaleSampleError, match=message):
        make_batch([good, stale], **options)  # type: ignore[arg-type]
    with pytest.raises(StaleSampleError, match="datum 0 was sampled by the base model"):
        make_batch([datum([1, 2], ".x")], **options)  # type: ignore[arg-type]
