"""What every trained state is made of: flat fp32 vectors under AdamW, and whole tensors gathered from shards."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from framework.distributed import Mesh
from framework.trainer.base import OptimResult
from framework.types import AdamParams


class FlatAdamW:
    """AdamW (Loshchilov & Hutter 2019) on one flat fp32 vector, of which each rank holds its shards and replicas."""

    def __init__(self, size: int, mesh: Mesh, device: torch.device, *, summed: slice, replicated: slice) -> None:
        """Zeros everywhere.

        Args:
            size: elements on this rank.
            mesh: of this rank.
            device: where the vectors live.
            summed: the run whose gradient is a part on each rank; the step adds the parts up over the group.
            replicated: the run that every rank of the group holds whole, counted once in the gradient's norm.
        """
        self.mesh = mesh
        self.master = torch.zeros(size, device=device)
        self.exp_avg = torch.zeros(size, device=device)
        self.exp_avg_sq = torch.zeros(size, device=device)
        self.num_steps = 0
        self.summed, self.replicated = summed, replicated

    def step(self, grad: Tensor, params: AdamParams) -> OptimResult:
        """Sums the gradient over ranks, clips, steps. All ranks of both groups must call.

        Args:
            grad: ``[size]`` float32 with respect to ``master``; overwritten.
            params: of this step.

        Returns:
            With a norm that is not finite nothing else has changed, on any rank.
        """
        if self.mesh.dp_size > 1:
            dist.all_reduce(grad, group=self.mesh.dp_group)
        if self.mesh.tp_size > 1 and self.summed.stop > self.summed.start:
            dist.all_reduce(grad[self.summed], group=self.mesh.tp_group)
        norm = self._norm(grad)
        if not math.isfinite(norm):
            return OptimResult(grad_norm=norm, step=self.num_steps)
        if params.max_grad_norm > 0.0 and norm > params.max_grad_norm:
            grad.mul_(params.max_grad_norm / (norm + 1e-6))
        self.num_steps += 1
        torch._fused_adamw_(
            [self.master],
            [grad],
            [self.exp_avg],
            [self.exp_avg_sq],
            [],
            [torch.tensor(float(self.num_steps), device=self.master.device)],
            lr=params.learning_rate,
            beta1=params.beta1,
            beta2=params.beta2,
            weight_decay=params.weight_decay,
            eps=params.eps,
            amsgrad=False,
            maximize=False,
        )
        return OptimResult(grad_norm=norm, step=self.num_steps)

    def _norm(self, grad: Tensor) -> float:
        start, stop = self.replicated.start, self.replicated.stop
        sharded = _square_sum(grad[:start]) + _square_sum(grad[stop:])
        if self.mesh.tp_size > 1:
            dist.all_reduce(sharded, group=self.mesh.tp_group)
        return float((_square_sum(grad[start:stop]) + sharded).sqrt())

    def restart(self) -> None:
        """Forgets the moments; the masters stay."""
        self.num_steps = 0
        self.exp_avg.zero_()
        self.exp_avg_sq.zero_()


def _square_sum(part: Tensor) -> Tensor:
    """0-d float64."""
    if not part.numel():
        return torch.zeros((), dtype=torch.float64, device=part.device)
    return torch.linalg.vector_norm(part, dtype=torch.float64).square()


def all_gather_whole(local: Tensor, mesh: Mesh, dim: int) -> Tensor:
    """The shards of the tensor-parallel group end to end along ``dim``. All ranks of the group must call."""
    if mesh.tp_size == 1:
        return local
    parts = [torch.empty_like(local, memory_format=torch.contiguous_format) for _ in range(mesh.tp_size)]
    dist.all_gather(parts, local.contiguous(), group=mesh.tp_group)
    return torch.cat(parts, dim=dim)
