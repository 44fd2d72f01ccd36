"""Packed attention against attention of each sequence alone, and rotary embeddings against transformers' formula."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from framework.models.spec import read_spec
from framework.trainer.megatron import cudnn_backward, flash
from framework.trainer.megatron.attention import PackedPlan, attend, backward_kernel, inverse_frequencies, plan, rotate

LENGTHS = (1, 7, 2, 16, 9, 1, 3)
HEADS, KV_HEADS, DIM = 4, 2, 16


def make_plan(lengths: tuple[int, ...], frequencies: Tensor | None = None) -> PackedPlan:
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    positions = torch.cat([torch.arange(n) for n in lengths])
    used = torch.ones(DIM // 2) if frequencies is None else frequencies
    return plan(positions, offsets, max(lengths), used, dtype=torch.float32, varlen=False)


def inputs(total: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(total, HEADS, DIM, generator=generator)
    k = torch.randn(total, KV_HEADS, DIM, generator=generator)
    v = torch.randn(total, KV_HEADS, DIM, generator=generator)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention of one sequence, head by head; query heads 0, 1 use key/value head 0."""
    heads = []
    for head in range(HEADS):
        own = head // (HEADS // KV_HEADS)
        scores = q[:, head] @ k[:, own].t() / DIM**0.5
        future = torch.ones_like(scores, dtype=torch.bool).triu(1)
        heads.append(scores.masked_fill(future, float("-inf")).softmax(-1) @ v[:, own])
    return torch.stack(heads, dim=1).flatten(1)


def test_packed_attention_equals_each_sequence_alone() -> None:
    total = sum(LENGTHS)
    q, k, v = inputs(total)
    out = attend(q, k, v, make_plan(LENGTHS))
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(9))
    got = torch.autograd.grad((out * weights).sum(), (q, k, v))
    want = torch.cat([by_hand(*(x.split(LENGTHS)[i] for x in (q, k, v))) for i in range(len(LENGTHS))])
    torch.testing.assert_close(out, want, rtol=0, atol=2e-6)
    for ours, theirs in zip(got, torch.autograd.grad((want * weights).sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=5e-6)


def test_a_sequence_neither_sees_nor_moves_its_neighbours() -> None:
    q, k, v = inputs(sum(LENGTHS))
    offsets = [0, *torch.tensor(LENGTHS).cumsum(0).tolist()]
    for index, length in enumerate(LENGTHS):
        here = slice(offsets[index], offsets[index] + length)
        out = attend(q, k, v, make_plan(LENGTHS))
        for gradient in torch.autograd.grad(out[here].sum(), (q, k, v)):
            gradient[here] = 0
            assert gradient.abs().max() == 0


@pytest.mark.parametrize("lengths", [(5,), (1,), (8, 8), (1, 2, 3, 4, 5, 6, 7, 8, 9)])
def test_buckets_cover_every_token_once(lengths: tuple[int, ...]) -> None:
    buckets = make_plan(lengths).buckets
    covered = torch.cat([bucket.target for bucket in buckets])
    assert covered.sort().values.tolist() == list(range(sum(lengths)))
    padded = sum(bucket.gather.numel() for bucket in buckets)
    assert padded <= 2 * sum(lengths), "padding to a neighbour of at most twice the length"


def test_rotation_equals_transformers(tiny: dict[str, Path]) -> None:
    from transformers import AutoConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    folder = tiny["llama3_rope"]
    spec, config = read_spec(folder), AutoConfig.from_pretrained(folder)
    q, k, _ = inputs(300)
    cos, sin = LlamaRotaryEmbedding(config)(q, torch.arange(300)[None])
    heads_first = [x.transpose(0, 1)[None] for x in (q, k)]
    want = apply_rotary_pos_emb(*heads_first, cos, sin)
    packed = make_plan((300,), inverse_frequencies(spec))
    for ours, theirs in zip((rotate(q, packed), rotate(k, packed)), want, strict=True):
        torch.testing.assert_close(ours, theirs[0].transpose(0, 1), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("transformer_engine", "head_dim", "by"),
    [(True, 128, cudnn_backward), (True, 256, flash), (False, 128, flash)],
)
def test_the_backward_kernel_is_cudnns_where_transformer_engine_is_there_and_has_one(
    transformer_engine: bool, head_dim: int, by: ModuleType
) -> None:
    assert backward_kernel(head_dim, transformer_engine=transformer_engine) is by.attention_backward


def test_transformer_engine_is_loaded_where_it_is_installed() -> None:
    assert cudnn_backward.load() is cudnn_backward.is_installed()


def test_a_transformer_engine_that_cannot_be_imported_is_named(tmp_path: Path) -> None:
    (tmp_path / "transformer_engine").mkdir()
    (tmp_path / "transformer_engine" / "__init__.py").write_text("raise OSError('undefined symbol: made for this')")
    (tmp_path / "transformer_engine_torch.py").touch()
    load = "from framework.trainer.megatron import cudnn_backward; cudnn_backward.load()"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    ended = subprocess.run([sys.executable, "-c", load], env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode != 0
    assert re.search(r"ConfigError: .*undefined symbol: made for this.*uninstall transformer-engine", ended.stderr)
