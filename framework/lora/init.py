"""How a fresh adapter starts: A random, B zero, the same for every backend and tensor-parallel size."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def init_a(path: str, *, rank: int, in_features: int, seed: int) -> Tensor:
    """A of one projection, Kaiming-uniform with a = sqrt(5), as PEFT starts it: U(-1/sqrt(in), 1/sqrt(in)).

    Args:
        path: HF module path; each projection draws from its own stream, so a rank can make the whole and slice.
        rank: rows.
        in_features: whole columns.
        seed: of the adapter.

    Returns:
        ``[rank, in_features]`` float32 on the CPU.
    """
    digest = hashlib.sha256(f"{seed}:{path}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    bound = in_features**-0.5
    return torch.empty(rank, in_features).uniform_(-bound, bound, generator=generator)
