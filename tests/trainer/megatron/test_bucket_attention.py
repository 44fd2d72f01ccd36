"""Attention by plain products over buckets: how sequences are bucketed, and rounding in bfloat16.

Values and gradients against attention by hand are in test_attention.py.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from framework.device import HOST
from framework.trainer.megatron.bucket_attention import BUCKET_SCORES, BucketAttention, make_buckets

HEADS, KV_HEADS, DIM = 6, 2, 16


def offsets(lengths: list[int]) -> list[int]:
    return [0, *torch.tensor(lengths).cumsum(0).tolist()]


def inputs(total: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(total)
    shapes = ((total, HEADS, DIM), (total, KV_HEADS, DIM), (total, KV_HEADS, DIM))
    q, k, v = (torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes)
    return q, k, v


def alone(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    """torch's attention of each sequence by itself."""
    parts = []
    for one in zip(*(x.split(lengths) for x in (q, k, v)), strict=True):
        a, b, c = (x.transpose(0, 1)[None] for x in one)
        parts.append(F.scaled_dot_product_attention(a, b, c, is_causal=True, enable_gqa=True)[0].transpose(0, 1))
    return torch.cat(parts)


def test_a_bucket_is_split_where_its_scores_are_too_many() -> None:
    lengths = [300] * 5 + [20] * 40 + [1100]
    buckets = make_buckets(offsets(lengths), HOST)
    shapes = sorted(tuple(bucket.gather.shape) for bucket in buckets)
    assert shapes == [(1, 300), (1, 1100), (2, 300), (2, 300), (40, 20)]
    assert all(s * n * n <= BUCKET_SCORES for s, n in shapes if s > 1)
    landed = torch.cat([bucket.target for bucket in buckets]).sort().values
    assert landed.tolist() == list(range(sum(lengths)))


def test_split_buckets_give_the_same_values_and_gradients() -> None:
    lengths = [290, 300, 270, 2, 3, 1]
    q, k, v = inputs(sum(lengths), torch.float32)
    out, want = BucketAttention.apply(q, k, v, make_buckets(offsets(lengths), HOST)), alone(q, k, v, lengths)
    dy = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(out, want, rtol=0, atol=1e-5)
    for got, expected in zip(
        torch.autograd.grad(out, (q, k, v), dy), torch.autograd.grad(want, (q, k, v), dy), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)


def test_bfloat16_is_about_as_far_from_the_truth_as_torchs_own() -> None:
    """The probabilities are rounded before the product with v, as in FlashAttention."""
    lengths = [40, 33, 7]
    exact = [x.detach().double() for x in inputs(sum(lengths), torch.bfloat16)]
    truth = alone(exact[0], exact[1], exact[2], lengths)
    q, k, v = inputs(sum(lengths), torch.bfloat16)
    ours = BucketAttention.apply(q, k, v, make_buckets(offsets(lengths), HOST))
    error = (ours.double() - truth).norm()
    assert error <= 1.5 * (alone(q, k, v, lengths).double() - truth).norm()
    assert error <= 4e-3 * truth.norm()


def test_nothing_but_the_inputs_is_kept() -> None:
    kept: list[tuple[int, ...]] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    q, k, v = inputs(50, torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        BucketAttention.apply(q, k, v, make_buckets([0, 50], HOST))
    assert kept == [(50, HEADS, DIM), (50, KV_HEADS, DIM), (50, KV_HEADS, DIM)]
