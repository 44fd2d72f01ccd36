"""Tensor-parallel linears with a frozen base weight and the factors of whichever adapter is switched on.

Tokens are flat: ``[T, features]``. Column-parallel (qkv_proj, gate_up_proj), output rows split over ranks:

        x [T, in] --- W_t [out/T, in] ------------------+--> y_t [T, out/T]
           \\--- A_all [n*r, in] --- B_i,t [rows_i, r] --/     (n slices: q, k, v or gate, up)

Row-parallel (o_proj, down_proj), input columns split over ranks, partial sums added by the reduction that the base
needs anyway:

        x_t [T, in/T] --- W_t [out, in/T] --------------+--> partial y --> sum over ranks
           \\--- A_t [r, in/T] --- B [out, r] -----------/

B arrives already multiplied by the scale. Gradients are added to fp32 buffers directly, never returned to autograd;
those of replicated factors (A above, B below) are partial until the optimizer step sums them over the group.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel import mappings
from torch import Tensor, nn

from framework.distributed import Mesh
from framework.trainer.megatron.pointwise import Pointwise


@dataclass(slots=True, kw_only=True)
class FactorSlice:
    """B of one projection inside a fused module."""

    rows: slice
    """Its rows of the local output."""
    columns: slice
    """Its rows of ``a_all``, hence its columns of u = x A^T."""
    b: Tensor
    """``[rows, r]`` compute dtype, scaled."""
    b_grad: Tensor
    """``[rows, r]`` float32, added to."""


@dataclass(slots=True, kw_only=True)
class ModuleFactors:
    """One adapter's factors of one fused module on this rank."""

    a_all: Tensor
    """``[n * r, in_local]`` compute dtype: the slices' A stacked."""
    a_grad: Tensor
    """``[n * r, in_local]`` float32, added to."""
    slices: tuple[FactorSlice, ...]
    dropout: float
    dropout_seed: int
    """Distinguishes modules; combined with :attr:`LoraSwitch.dropout_counter`."""


class LoraSwitch:
    """Which adapter the model's linears apply. One per model, shared by all its linears.

    It must not change between a forward and its backward: activation recomputation reads it again.
    """

    def __init__(self) -> None:
        self.modules: Mapping[str, ModuleFactors] = {}
        """By fused module path; empty is the base model."""
        self.training = False
        """Dropout is applied only while True."""
        self.dropout_counter = 0
        """Set for every training microbatch, so that every mask is drawn once and can be drawn again."""


class _LoraMatmul(torch.autograd.Function):
    """y = x W^T + bias + sum_i (mask * x) A_i^T B_i^T, saving x and u only."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        factors: ModuleFactors,
        mask: Tensor | None,
        pointwise: Pointwise,
    ) -> Tensor:
        y = pointwise.product(x, weight, bias)
        u = pointwise.product(x if mask is None else x * mask, factors.a_all, None)
        for part in factors.slices:
            pointwise.add_delta(y[:, part.rows], u[:, part.columns], part.b)
        ctx.save_for_backward(x, weight, u, mask)
        ctx.factors = factors
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        x, weight, u, mask = ctx.saved_tensors
        factors: ModuleFactors = ctx.factors
        du = torch.empty_like(u)
        for part in factors.slices:
            dy_part = dy[:, part.rows]
            torch.mm(dy_part, part.b, out=du[:, part.columns])
            part.b_grad.add_(dy_part.t() @ u[:, part.columns])
        factors.a_grad.add_(du.t() @ (x if mask is None else x * mask))
        if not ctx.needs_input_grad[0]:
            return (None,) * 6
        dx = dy @ weight
        if mask is None:
            dx.addmm_(du, factors.a_all)
        else:
            dx.addcmul_(du @ factors.a_all, mask)
        return dx, None, None, None, None, None


class ParallelLinear(nn.Module):
    """The shared half of the two kinds below: a frozen local weight and the local product."""

    weight: Tensor
    """``[out_local, in_local]`` compute dtype; bound after construction, possibly a view of the engine's."""
    bias: Tensor | None

    def __init__(
        self, path: str, mesh: Mesh, switch: LoraSwitch, *, sequence_parallel: bool, pointwise: Pointwise
    ) -> None:
        super().__init__()
        self.pointwise = pointwise
        self.path = path
        self.mesh = mesh
        self.switch = switch
        self.sequence_parallel = sequence_parallel
        self.register_buffer("weight", None, persistent=False)
        self.register_buffer("bias", None, persistent=False)

    def local_product(self, x: Tensor) -> Tensor:
        """``[T, in_local] -> [T, out_local]``, with the switched-on adapter."""
        factors = self.switch.modules.get(self.path)
        if factors is None:
            return self.pointwise.product(x, self.weight, self.bias)
        return _LoraMatmul.apply(x, self.weight, self.bias, factors, self._mask(x, factors), self.pointwise)

    def _mask(self, x: Tensor, factors: ModuleFactors) -> Tensor | None:
        """Dropout multipliers of x, the same values for every tensor-parallel size: drawn whole, then sliced."""
        if not (self.switch.training and factors.dropout):
            return None
        parts = self.mesh.tp_size if isinstance(self, RowParallelLinear) else 1
        seed = (factors.dropout_seed * 1_000_003 + self.switch.dropout_counter) % 2**63
        generator = torch.Generator().manual_seed(seed)
        keep = torch.rand(x.shape[0], x.shape[1] * parts, generator=generator) >= factors.dropout
        if parts > 1:
            keep = keep.chunk(parts, dim=1)[self.mesh.tp_rank]
        return keep.to(device=x.device, dtype=x.dtype) / (1.0 - factors.dropout)


class ColumnParallelLinear(ParallelLinear):
    """Splits the output features; every rank sees the whole input."""

    def forward(self, x: Tensor) -> Tensor:
        """``[T or T/tp, in] -> [T, out/tp]``; the input is a sequence shard when sequence parallelism is on."""
        if self.sequence_parallel:
            x = mappings.gather_from_sequence_parallel_region(x, group=self.mesh.tp_group)
        elif self.mesh.tp_size > 1:
            x = mappings.copy_to_tensor_model_parallel_region(x, group=self.mesh.tp_group)
        return self.local_product(x)


class RowParallelLinear(ParallelLinear):
    """Splits the input features; the partial outputs are summed over the ranks."""

    def forward(self, x: Tensor) -> Tensor:
        """``[T, in/tp] -> [T or T/tp, out]``; the output is a sequence shard when sequence parallelism is on."""
        y = self.local_product(x)
        if self.sequence_parallel:
            return mappings.reduce_scatter_to_sequence_parallel_region(y, group=self.mesh.tp_group)
        if self.mesh.tp_size > 1:
            return mappings.reduce_from_tensor_model_parallel_region(y, group=self.mesh.tp_group)
        return y
