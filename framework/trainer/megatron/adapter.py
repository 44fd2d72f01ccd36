"""One adapter's state on a rank: flat buffers, AdamW on fp32 masters, and the views the model computes with.

Everything is one flat vector, ordered so that what must be reduced and what must be scaled is contiguous:

    [ A of row-parallel | A of column-parallel | B of row-parallel | B of column-parallel ]
      sharded             replicated             replicated          sharded
                          `---- summed over the tp group ----`
                                               `------- multiplied by the scale -------`

    master   fp32, what AdamW updates and checkpoints keep
    weights  compute dtype: master, B times the scale; what the forward reads and the engine is given, bit for bit
    grad     fp32, with respect to ``master``
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from framework.distributed import Mesh
from framework.errors import AdapterError
from framework.lora.init import init_a
from framework.lora.spec import LoraSpec
from framework.models.layout import Projection, projections
from framework.models.spec import ModelSpec
from framework.trainer.base import LoraShard, OptimResult
from framework.trainer.megatron.flat import FlatAdamW, all_gather_whole
from framework.trainer.megatron.lora_linear import FactorSlice, LoraSwitch, ModuleFactors
from framework.types import AdamParams


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Where one local factor lies in the flat vector."""

    offset: int
    shape: tuple[int, int]

    def view(self, flat: Tensor) -> Tensor:
        """The factor inside ``flat``, as a matrix."""
        return flat[self.offset : self.offset + self.shape[0] * self.shape[1]].view(self.shape)


class AdapterState:
    """Factors, gradient and optimizer of one adapter on this rank."""

    def __init__(
        self, model: ModelSpec, spec: LoraSpec, mesh: Mesh, *, seed: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.spec = spec
        self.mesh = mesh
        self.seed = seed
        self.projections = tuple(projections(model, spec.targets))
        self.a: dict[str, Piece] = {}
        self.b: dict[str, Piece] = {}
        replicated, self._scaled, size = self._lay_out()
        self._optimizer = FlatAdamW(size, mesh, device, summed=replicated, replicated=replicated)
        self.master = self._optimizer.master
        self.grad = torch.zeros(size, device=device)
        self.weights = torch.zeros(size, dtype=dtype, device=device)
        self.num_microbatches = 0
        """Trained on so far; every one has its own dropout masks."""
        for p in self.projections:
            a = init_a(p.path, rank=spec.rank, in_features=p.in_features, seed=seed)
            self.a[p.path].view(self.master).copy_(a if p.column_parallel else self._columns(a))
        self._shards = {
            p.path: LoraShard(a=self.a[p.path].view(self.weights), b=self.b[p.path].view(self.weights))
            for p in self.projections
        }
        self.publish()

    def _lay_out(self) -> tuple[slice, slice, int]:
        """Assigns every factor its place; returns the replicated run, the scaled run and the total size."""
        r, tp = self.spec.rank, self.mesh.tp_size
        offset, marks = 0, []
        for factors, is_a, column_parallel in (
            (self.a, True, False),
            (self.a, True, True),
            (self.b, False, False),
            (self.b, False, True),
        ):
            marks.append(offset)
            for p in self.projections:
                if p.column_parallel is not column_parallel:
                    continue
                if is_a:
                    shape = (r, p.in_features if column_parallel else p.in_features // tp)
                else:
                    shape = (p.out_features // tp if column_parallel else p.out_features, r)
                factors[p.path] = Piece(offset=offset, shape=shape)
                offset += shape[0] * shape[1]
        return slice(marks[1], marks[3]), slice(marks[2], offset), offset

    def _columns(self, whole: Tensor) -> Tensor:
        return whole.chunk(self.mesh.tp_size, dim=1)[self.mesh.tp_rank]

    def _rows(self, whole: Tensor) -> Tensor:
        return whole.chunk(self.mesh.tp_size, dim=0)[self.mesh.tp_rank]

    def publish(self) -> None:
        """Refreshes the compute-dtype weights from the masters."""
        self.weights.copy_(self.master)
        if self.spec.scale != 1.0:
            self.weights[self._scaled] = self.master[self._scaled] * self.spec.scale

    def module_factors(self, grad: Tensor) -> dict[str, ModuleFactors]:
        """What the linears compute with, by fused module path; gradients of ``weights`` are added to ``grad``.

        Args:
            grad: ``[size]`` float32.
        """
        by_parent: dict[str, list[Projection]] = {}
        for p in self.projections:
            by_parent.setdefault(p.parent, []).append(p)
        return {parent: self._fused(index, members, grad) for index, (parent, members) in enumerate(by_parent.items())}

    def _fused(self, index: int, members: list[Projection], grad: Tensor) -> ModuleFactors:
        r = self.spec.rank
        first = self.a[members[0].path]
        stacked = Piece(offset=first.offset, shape=(r * len(members), first.shape[1]))
        parts: list[FactorSlice] = []
        row = 0
        for position, height in enumerate(self._heights(members[0])):
            p = next((m for m in members if m.slice_index == position), None)
            if p is not None:
                place = len(parts) * r
                piece = self.b[p.path]
                parts.append(
                    FactorSlice(
                        rows=slice(row, row + height),
                        columns=slice(place, place + r),
                        b=piece.view(self.weights),
                        b_grad=piece.view(grad),
                    )
                )
            row += height
        return ModuleFactors(
            a_all=stacked.view(self.weights),
            a_grad=stacked.view(grad),
            slices=tuple(parts),
            dropout=self.spec.dropout,
            dropout_seed=self.seed * 4099 + index,
        )

    def _heights(self, member: Projection) -> list[int]:
        """Local rows of every slice of the fused module that ``member`` belongs to."""
        return [rows // self.mesh.tp_size if member.column_parallel else rows for rows in member.sibling_rows]

    def accumulate(self, grad: Tensor) -> None:
        """Adds a gradient with respect to ``weights``, turning it into one with respect to ``master``."""
        grad[self._scaled].mul_(self.spec.scale)
        self.grad.add_(grad)

    def switch_on(self, switch: LoraSwitch, grad: Tensor | None) -> None:
        """Makes the model's linears apply this adapter; a backward pass adds to ``grad`` (None: there will be none)."""
        switch.modules = self.module_factors(self.grad if grad is None else grad)

    def new_gradient(self) -> Tensor:
        """Zeros, for one call's gradient with respect to ``weights``."""
        return torch.zeros_like(self.grad)

    def zero_grad(self) -> None:
        """Forgets the accumulated gradient."""
        self.grad.zero_()

    def optim_step(self, params: AdamParams) -> OptimResult:
        """Steps AdamW, publishes, clears the gradient. All ranks of both groups must call.

        A gradient whose norm is not finite is dropped on every rank, and nothing else changes.
        """
        result = self._optimizer.step(self.grad, params)
        self.grad.zero_()
        self.publish()
        return result

    def shards(self) -> dict[str, LoraShard]:
        """This rank's factors as the engine takes them, in module order; the same views every time."""
        return self._shards

    def gather(self) -> dict[str, Tensor]:
        """Whole unscaled fp32 factors by PEFT's names, on the CPU. All ranks of the tensor-parallel group must call."""
        whole: dict[str, Tensor] = {}
        for p in self.projections:
            a, b = self.a[p.path].view(self.master), self.b[p.path].view(self.master)
            if p.column_parallel:
                b = all_gather_whole(b, self.mesh, 0)
            else:
                a = all_gather_whole(a, self.mesh, 1)
            whole[f"{p.path}.lora_A.weight"] = a.cpu().clone()
            whole[f"{p.path}.lora_B.weight"] = b.cpu().clone()
        return whole

    def scatter(self, whole: Mapping[str, Tensor]) -> None:
        """Overwrites the masters from whole factors, named as by :meth:`gather`; the optimizer starts fresh."""
        for p in self.projections:
            a, b = whole[f"{p.path}.lora_A.weight"], whole[f"{p.path}.lora_B.weight"]
            self.a[p.path].view(self.master).copy_(a if p.column_parallel else self._columns(a))
            self.b[p.path].view(self.master).copy_(self._rows(b) if p.column_parallel else b)
        self._optimizer.restart()
        self.grad.zero_()
        self.publish()

    def whole_shapes(self) -> Iterable[tuple[str, tuple[int, int]]]:
        """Name and shape of every tensor of :meth:`gather`."""
        for p in self.projections:
            yield f"{p.path}.lora_A.weight", (self.spec.rank, p.in_features)
            yield f"{p.path}.lora_B.weight", (p.out_features, self.spec.rank)

    def state_dict(self) -> dict[str, Tensor]:
        """CPU copies of everything that a resumed run needs."""
        state = {name: flat.detach().cpu().clone() for name, flat in self._flats().items()}
        return {
            **state,
            "step": torch.tensor(self._optimizer.num_steps),
            "num_microbatches": torch.tensor(self.num_microbatches),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of :meth:`state_dict`.

        Raises:
            AdapterError: a tensor is missing or of another size; nothing was changed.
        """
        flats = self._flats()
        missing = sorted({*flats, "step", "num_microbatches"} - set(state))
        if missing:
            raise AdapterError(f"the adapter's saved state lacks {missing}")
        for name, flat in flats.items():
            if state[name].shape != flat.shape:
                raise AdapterError(
                    f"the adapter's saved {name} has shape {tuple(state[name].shape)}, this one {tuple(flat.shape)}: "
                    f"it was saved with another lora.* or parallel.tensor_parallel_size"
                )
        for name, flat in flats.items():
            flat.copy_(state[name])
        self._optimizer.num_steps = int(state["step"])
        self.num_microbatches = int(state["num_microbatches"])
        self.publish()

    def _flats(self) -> dict[str, Tensor]:
        return {
            "master": self.master,
            "grad": self.grad,
            "exp_avg": self._optimizer.exp_avg,
            "exp_avg_sq": self._optimizer.exp_avg_sq,
        }
