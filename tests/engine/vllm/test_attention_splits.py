"""Steps are described to the attention kernel in one piece where that is wanted, and then sum alike in every batch."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from framework.engine.vllm.attention_splits import MANY_QUERIES, in_one_piece


@dataclass
class Step:
    """What vLLM says of a step, as far as it is read here."""

    num_reqs: int
    max_query_len: int


@dataclass
class Described:
    max_num_splits: int
    max_query_len: int
    scheduler_metadata: Any = "a schedule"


class Builder:
    """vLLM's, with eight key/value heads; beyond ``graphs`` requests it leaves the number of pieces open."""

    num_heads_kv, max_num_splits = 8, 32

    def __init__(self, *, graphs: int = 256, context: int = 1024) -> None:
        self.graphs, self.model_config = graphs, SimpleNamespace(max_model_len=context)

    def build(self, common_prefix_len: int, common: Step, fast_build: bool = False) -> Described:
        pieces = self.max_num_splits if common.num_reqs <= self.graphs else 0
        return Described(max_num_splits=pieces, max_query_len=common.max_query_len)


def describe(builder: Builder, step: Step, *, exact: bool) -> Described:
    made: Described = in_one_piece(Builder.build, exact=exact, multiprocessors=132)(
        builder, common_prefix_len=0, common_attn_metadata=step
    )
    return made


@pytest.mark.parametrize(("num_reqs", "longest", "pieces"), [(128, 1, 1), (14, 1, 1), (13, 1, 32), (128, 9, 32)])
def test_a_decode_step_that_fills_the_device_is_in_one_piece(num_reqs: int, longest: int, pieces: int) -> None:
    builder = Builder()
    step = Step(num_reqs=num_reqs, max_query_len=longest)
    made = describe(builder, step, exact=False)
    assert made == Described(max_num_splits=pieces, max_query_len=longest)
    assert builder.max_num_splits == 32


def test_where_a_context_can_be_long_the_kernel_may_cut_it() -> None:
    made = describe(Builder(context=32768), Step(num_reqs=128, max_query_len=1), exact=False)
    assert made == Described(max_num_splits=32, max_query_len=1)


@pytest.mark.parametrize(("num_reqs", "longest"), [(1, 1), (128, 1), (3, 900)])
def test_exact_every_step_is(num_reqs: int, longest: int) -> None:
    made = describe(Builder(), Step(num_reqs=num_reqs, max_query_len=longest), exact=True)
    assert made == Described(max_num_splits=1, max_query_len=max(65, longest))


def test_exact_a_schedule_made_for_any_number_of_pieces_is_dropped() -> None:
    made = describe(Builder(graphs=2), Step(num_reqs=3, max_query_len=9), exact=True)
    assert made == Described(max_num_splits=1, max_query_len=65, scheduler_metadata=None)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("query", "kv", "dim"), [(9, 3, 64), (4, 4, 64), (8, 2, 32), (16, 8, 128), (32, 8, 128), (4, 1, 256)]
)
def test_a_token_decoded_from_the_cache_has_the_bits_of_the_trainers_forward(
    query: int, kv: int, dim: int, lengths: tuple[int, ...]
) -> None:
    """As exact steps are described: one piece, and more queries than there are."""
    from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func, get_flash_attn_version

    from framework.engine.vllm.attention import engine_attention

    page = 16
    starts = [0, *itertools.accumulate(lengths)]
    device = torch.accelerator.current_accelerator()

    def draw(heads: int) -> Tensor:
        return torch.randn(starts[-1], heads, dim, device=device).bfloat16()

    q, k, v = draw(query), draw(kv), draw(kv)
    want, _ = engine_attention(q, k, v, torch.tensor(starts, dtype=torch.int32, device=device), max(lengths))
    pages = [-(-length // page) for length in lengths]
    cache = torch.zeros(2, sum(pages), page, kv, dim, device=device, dtype=q.dtype)
    table = torch.zeros(len(lengths), max(pages), dtype=torch.int32, device=device)
    for i, (start, length) in enumerate(zip(starts, lengths, strict=False)):
        first = sum(pages[:i])
        table[i, : pages[i]] = torch.arange(first, first + pages[i], device=device)
        for side, values in enumerate((k, v)):
            cache[side, first : first + pages[i]].view(-1, kv, dim)[:length] = values[start : start + length]
    for back in (0, 1, 16):
        used = torch.tensor([length - back for length in lengths], dtype=torch.int32, device=device)
        rows = torch.tensor([start + length - back - 1 for start, length in zip(starts, lengths, strict=False)])
        got = flash_attn_varlen_func(
            q[rows.to(q.device)],
            cache[0],
            cache[1],
            cu_seqlens_q=torch.arange(len(lengths) + 1, dtype=torch.int32, device=device),
            seqused_k=used,
            max_seqlen_q=MANY_QUERIES,
            max_seqlen_k=1024,
            causal=True,
            block_table=table,
            num_splits=1,
            fa_version=get_flash_attn_version(head_size=dim),
        )
        assert torch.equal(got, want[rows.to(q.device)]), back
