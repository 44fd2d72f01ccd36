"""The engine's call and the trainer's give the same bits, and a token's do not depend on its batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.gpu


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, device=torch.accelerator.current_accelerator(), dtype=torch.float32).bfloat16()


@pytest.mark.parametrize(("query", "kv", "dim"), [(16, 8, 128), (32, 8, 128), (6, 2, 64), (5, 1, 80)])
def test_both_calls_give_the_same_bits_for_any_number_of_tokens(query: int, kv: int, dim: int) -> None:
    from framework.kernels.norm_rotate import norm_rotate, split_norm_rotate

    tokens = 257
    qkv, weights, table = draw(tokens, (query + 2 * kv) * dim), (draw(dim), draw(dim)), draw(1000, dim)
    positions = torch.randint(0, 1000, (tokens,), device=qkv.device)
    angles = table[positions]
    cos, sin = angles[:, : dim // 2], angles[:, dim // 2 :]
    q, k, v = split_norm_rotate(qkv, weights, cos, sin, query=query, kv=kv, eps=1e-6)
    assert torch.equal(v.flatten(1), qkv[:, (query + kv) * dim :])
    for part in (slice(0, tokens), slice(0, 1), slice(100, 133)):
        ours = norm_rotate(qkv[part], *weights, positions[part], table, query, kv, 1e-6)
        assert torch.equal(ours[0], q[part].flatten(1))
        assert torch.equal(ours[1], k[part].flatten(1))
