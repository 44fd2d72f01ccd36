"""Logprobs and entropy of chosen tokens from hidden states, with the vocabulary split over ranks.

The logits of a chunk of positions exist only while the chunk is worked on, in the forward pass and again in the
backward pass; what is kept per position is log Z and the entropy.

With z = logits / temperature and p = softmax(z):  log p_t = z_t - log Z,  H = log Z - sum_j p_j z_j, and
d log p_t / dz_j = [j = t] - p_j,  dH / dz_j = -p_j (z_j - log Z + H).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

CHUNK_BYTES = 64 * 2**20
"""Of one chunk's fp32 logits on a rank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VocabShard:
    """This rank's rows of the output layer."""

    weight: Tensor
    """``[rows, hidden]`` compute dtype, without padding rows."""
    start: int
    """Vocabulary id of row 0."""
    padded_rows: int
    """Rows with padding, the same on every rank, so that all ranks cut the same chunks."""
    group: dist.ProcessGroup
    group_size: int

    def chunks(self, num_positions: int) -> Iterator[slice]:
        """Runs of positions whose fp32 logits fit :data:`CHUNK_BYTES`."""
        size = max(1, CHUNK_BYTES // (4 * self.padded_rows))
        for begin in range(0, num_positions, size):
            yield slice(begin, min(begin + size, num_positions))

    def reduce(self, tensor: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        """All-reduces in place over the ranks that share the vocabulary."""
        if self.group_size > 1:
            dist.all_reduce(tensor, op=op, group=self.group)
        return tensor


class _Logprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, targets: Tensor, shard: VocabShard, temperature: float
    ) -> tuple[Tensor, Tensor]:
        count = len(targets)
        log_z = torch.empty(count, dtype=torch.float32, device=hidden.device)
        mean_z, picked = torch.empty_like(log_z), torch.empty_like(log_z)
        for part in shard.chunks(count):
            z = _logits(hidden[part], shard, temperature)
            top = shard.reduce(z.amax(dim=1), dist.ReduceOp.MAX)
            local = targets[part] - shard.start
            mine = (local >= 0) & (local < z.shape[1])
            target_z = z.gather(1, local.clamp(0, z.shape[1] - 1)[:, None]).squeeze(1) * mine
            weights = (z - top[:, None]).exp_()
            sums = torch.stack([weights.sum(dim=1), (weights * z).sum(dim=1), target_z])
            total, weighted, target_z = shard.reduce(sums)
            log_z[part] = top + total.log()
            mean_z[part] = weighted / total
            picked[part] = target_z
        entropy = log_z - mean_z
        ctx.save_for_backward(hidden, targets, log_z, entropy)
        ctx.shard, ctx.temperature = shard, temperature
        return picked - log_z, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_logprobs, grad_entropy = grads
        hidden, targets, log_z, entropy = ctx.saved_tensors
        shard: VocabShard = ctx.shard
        has_entropy = bool(grad_entropy.any())
        grad_hidden = torch.empty_like(hidden)
        for part in shard.chunks(len(targets)):
            log_p = _logits(hidden[part], shard, ctx.temperature).sub_(log_z[part][:, None])
            p = log_p.exp()
            if has_entropy:
                scale = -grad_entropy[part][:, None] * (log_p + entropy[part][:, None])
                grad_z = p * (scale - grad_logprobs[part][:, None])
            else:
                grad_z = p.mul_(-grad_logprobs[part][:, None])
            local = targets[part] - shard.start
            rows = torch.nonzero((local >= 0) & (local < grad_z.shape[1])).squeeze(1)
            grad_z[rows, local[rows]] += grad_logprobs[part][rows]
            grad_hidden[part] = (grad_z / ctx.temperature).to(hidden.dtype) @ shard.weight
        return grad_hidden, None, None, None


def _logits(hidden: Tensor, shard: VocabShard, temperature: float) -> Tensor:
    """``[n, rows]`` float32 logits divided by the temperature; a matrix product in the compute dtype, like the engine's."""
    z = (hidden @ shard.weight.t()).float()
    return z if temperature == 1.0 else z.div_(temperature)


def logprobs_and_entropy(
    hidden: Tensor, targets: Tensor, shard: VocabShard, temperature: float
) -> tuple[Tensor, Tensor]:
    """Logprobs of ``targets`` and the entropy at each position.

    Args:
        hidden: ``[M, hidden]`` compute dtype, the same on every rank; its gradient is this rank's part of the sum.
        targets: ``[M]`` int64 vocabulary ids.
        shard: this rank's part of the output layer. All ranks of its group must call.
        temperature: > 0.

    Returns:
        Two ``[M]`` float32 tensors, the same on every rank.
    """
    return _Logprobs.apply(hidden, targets, shard, temperature)
