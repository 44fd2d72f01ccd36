"""Logprobs and entropy of chosen tokens from hidden states, with the vocabulary split over ranks.

The logits of a chunk of positions exist only while the chunk is worked on. What is kept per position is log Z, the
entropy, and the derivative of the logprob with respect to the hidden state: made while the logits are at hand, it costs
one product and spares the backward pass both the logits and the product with them. Where the output layer itself is
trained, its gradient needs the logits again, and the hidden state's is made from them too.

With z = logits / temperature and p = softmax(z):  log p_t = z_t - log Z,  H = log Z - sum_j p_j z_j, and
d log p_t / dz_j = [j = t] - p_j,  dH / dz_j = -p_j (z_j - log Z + H).  The entropy's derivative is made in the backward
pass, from the logits made again, and only where the loss depends on it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from framework.trainer.megatron.pointwise import PLAIN, Pointwise, VocabGradient

CHUNK_BYTES = PLAIN.chunk_bytes
"""Of one chunk's fp32 logits on a rank, where there are no kernels."""


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
    pointwise: Pointwise = PLAIN

    def chunks(self, num_positions: int) -> Iterator[slice]:
        """Runs of positions whose fp32 logits fit the pointwise functions' chunk."""
        size = max(1, self.pointwise.chunk_bytes // (4 * self.padded_rows))
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
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, shard: VocabShard, temperature: float
    ) -> tuple[Tensor, Tensor]:
        count = len(targets)
        log_z = torch.empty(count, dtype=torch.float32, device=hidden.device)
        entropy, picked = torch.empty_like(log_z), torch.empty_like(log_z)
        direction = torch.empty_like(hidden) if ctx.needs_input_grad[:2] == (True, False) else None
        one, zero = torch.ones_like(log_z), torch.zeros_like(log_z)
        for part in shard.chunks(count):
            logits = shard.pointwise.logits(hidden[part], weight)
            local = targets[part] - shard.start
            stats = shard.pointwise.vocab_stats(logits, local, temperature)
            top = shard.reduce(stats.top.clone(), dist.ReduceOp.MAX)
            share = (stats.top - top).exp()
            sums = torch.stack([stats.total * share, stats.weighted * share, stats.picked])
            total, weighted, picked[part] = shard.reduce(sums)
            log_z[part] = top + total.log()
            entropy[part] = log_z[part] - weighted / total
            if direction is not None:
                parts = _gradient(part, log_z=log_z, entropy=entropy, grad_logprobs=one, grad_entropy=zero)
                grad = shard.pointwise.vocab_gradient(logits, local, temperature, parts, hidden.dtype)
                torch.mm(grad, weight, out=direction[part])
        ctx.save_for_backward(hidden, weight, targets, log_z, entropy, direction)
        ctx.shard, ctx.temperature = shard, temperature
        return picked - log_z, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_logprobs, grad_entropy = grads
        hidden, weight, targets, log_z, entropy, direction = ctx.saved_tensors
        if direction is None:
            made = _both_gradients(ctx, grad_logprobs, grad_entropy)
            return made[0], made[1], None, None, None
        shard: VocabShard = ctx.shard
        grad_hidden = (direction * grad_logprobs[:, None]).to(hidden.dtype)
        if grad_entropy.any():
            zero = torch.zeros_like(log_z)
            for part in shard.chunks(len(targets)):
                logits = shard.pointwise.logits(hidden[part], weight)
                parts = _gradient(part, log_z=log_z, entropy=entropy, grad_logprobs=zero, grad_entropy=grad_entropy)
                local = targets[part] - shard.start
                grad = shard.pointwise.vocab_gradient(logits, local, ctx.temperature, parts, hidden.dtype)
                grad_hidden[part] += grad @ weight
        return grad_hidden, None, None, None, None


def _both_gradients(ctx: Any, grad_logprobs: Tensor, grad_entropy: Tensor) -> tuple[Tensor, Tensor]:
    """Of the hidden states and of the output layer, from the logits made again; the layer's is added up in fp32."""
    hidden, weight, targets, log_z, entropy, _ = ctx.saved_tensors
    shard: VocabShard = ctx.shard
    grad_hidden = torch.empty_like(hidden)
    grad_weight = torch.zeros_like(weight, dtype=torch.float32)
    whole = {"log_z": log_z, "entropy": entropy, "grad_logprobs": grad_logprobs, "grad_entropy": grad_entropy}
    for part in shard.chunks(len(targets)):
        logits = shard.pointwise.logits(hidden[part], weight)
        parts = _gradient(part, **whole)
        local = targets[part] - shard.start
        grad = shard.pointwise.vocab_gradient(logits, local, ctx.temperature, parts, hidden.dtype)
        torch.mm(grad, weight, out=grad_hidden[part])
        grad_weight += grad.t() @ hidden[part]
    return grad_hidden, grad_weight.to(weight.dtype)


def _gradient(part: slice, **whole: Tensor) -> VocabGradient:
    """The positions of one chunk."""
    return VocabGradient(**{name: tensor[part] for name, tensor in whole.items()})


def logprobs_and_entropy(
    hidden: Tensor, targets: Tensor, shard: VocabShard, temperature: float
) -> tuple[Tensor, Tensor]:
    """Logprobs of ``targets`` and the entropy at each position.

    Args:
        hidden: ``[M, hidden]`` compute dtype, the same on every rank; its gradient is this rank's part of the sum.
        targets: ``[M]`` int64 vocabulary ids.
        shard: this rank's part of the output layer. All ranks of its group must call. Its weight gets a gradient where
            it asks for one.
        temperature: > 0.

    Returns:
        Two ``[M]`` float32 tensors, the same on every rank.
    """
    return _Logprobs.apply(hidden, shard.weight, targets, shard, temperature)
