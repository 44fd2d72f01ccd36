"""The base model's own parameters as what is trained: fp32 masters and moments beside tensors that others read.

The tensors are those the model computes with, and on a GPU those the engine samples with: the step writes into them.
Flat vectors are ordered so that what must be reduced is contiguous:

    [ norms over the hidden size | norms over heads | everything else ]
      replicated                   replicated         sharded
      `- partial with sequence -' `- partial: each -'
         parallelism, else equal      rank's own heads

    master   fp32, what AdamW updates and checkpoints keep
    weights  compute dtype: the master rounded; published in place
    grad     fp32; each microbatch's gradient arrives in the compute dtype and is added here
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from framework.device import HOST
from framework.distributed import Mesh
from framework.errors import AdapterError
from framework.models.layout import Entry, Split, entries
from framework.models.spec import ModelSpec
from framework.models.weights import expected_shape
from framework.trainer.base import OptimResult
from framework.trainer.megatron.flat import FlatAdamW, all_gather_whole
from framework.trainer.megatron.lora_linear import LoraSwitch
from framework.types import AdamParams

HEAD_NORMS = ("q_norm.weight", "k_norm.weight")
"""Replicated, but each rank applies them to its own heads."""


class BaseState:
    """Parameters, gradient and optimizer of the base model on this rank."""

    def __init__(self, model: ModelSpec, weights: Mapping[str, Tensor], mesh: Mesh, *, sequence_parallel: bool) -> None:
        """Makes the tensors leaves of autograd and copies them into fp32 masters.

        Args:
            model: spec.
            weights: this rank's parameters by the layout's names: the model's own tensors, written into by every step.
            mesh: of this rank.
            sequence_parallel: whether ranks see different tokens between the linears.
        """
        self.mesh = mesh
        self._model = model
        self._weights = dict(weights)
        self._entries = sorted(entries(model), key=_run)
        self._places: dict[str, slice] = {}
        ends, offset = [0, 0, 0], 0
        for entry in self._entries:
            size = self._weights[entry.name].numel()
            self._places[entry.name] = slice(offset, offset + size)
            offset += size
            ends[_run(entry)] = offset
        heads_end = max(ends[:2])
        self._optimizer = FlatAdamW(
            offset,
            mesh,
            self._weights[self._entries[0].name].device,
            summed=slice(0 if sequence_parallel else ends[0], heads_end),
            replicated=slice(0, heads_end),
        )
        self._grad: Tensor | None = None
        """None is zero; a gradient takes as much memory as the masters."""
        self._target: Tensor | None = None
        self.num_microbatches = 0
        self._hooks = []
        for name, leaf in self._weights.items():
            self._view(self._optimizer.master, name).copy_(leaf)
            leaf.requires_grad_(True)
            self._hooks.append(leaf.register_post_accumulate_grad_hook(self._collector(name)))

    def release(self) -> None:
        """Leaves the tensors as they are and freezes them again; the state is of no use afterwards."""
        for hook in self._hooks:
            hook.remove()
        for leaf in self._weights.values():
            leaf.requires_grad_(False)

    def _view(self, flat: Tensor, name: str) -> Tensor:
        return flat[self._places[name]].view(self._weights[name].shape)

    def _collector(self, name: str) -> Callable[[Tensor], None]:
        def collect(leaf: Tensor) -> None:
            assert self._target is not None, f"{name} got a gradient outside a training step"
            assert leaf.grad is not None
            self._view(self._target, name).add_(leaf.grad)
            leaf.grad = None

        return collect

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """What the model computes with."""
        return self._weights

    def switch_on(self, switch: LoraSwitch, grad: Tensor | None) -> None:
        """No adapter is applied; a backward pass adds to ``grad``."""
        self._target = grad

    def new_gradient(self) -> Tensor:
        """Zeros, for one call's gradient."""
        return torch.zeros_like(self._optimizer.master)

    def accumulate(self, grad: Tensor) -> None:
        """Adds one call's gradient, which is this object's from now on."""
        self._grad = grad if self._grad is None else self._grad.add_(grad)
        self._target = None

    def zero_grad(self) -> None:
        """Forgets the accumulated gradient."""
        self._grad = None

    def optim_step(self, params: AdamParams) -> OptimResult:
        """Steps AdamW, writes the weights, clears the gradient. All ranks of both groups must call.

        A gradient whose norm is not finite is dropped on every rank, and nothing else changes.
        """
        grad = self.new_gradient() if self._grad is None else self._grad
        result = self._optimizer.step(grad, params)
        self._grad = None
        if math.isfinite(result.grad_norm):
            self.publish()
        return result

    def publish(self) -> None:
        """Rounds the masters into the weights, in place."""
        with torch.no_grad():
            masters = [self._view(self._optimizer.master, name) for name in self._weights]
            torch._foreach_copy_(list(self._weights.values()), masters)

    def export(self) -> dict[str, Tensor]:
        """Whole weights by HF name, in their dtype, on the CPU. All ranks of the tensor-parallel group must call."""
        whole: dict[str, Tensor] = {}
        for entry in entries(self._model):
            local = self._weights[entry.name].detach()
            for source, part in zip(entry.sources, self._parts(entry, local), strict=True):
                rows = expected_shape(source, self._model)[0]  # fewer than there are where the vocabulary is padded
                whole[source] = self._whole(entry, part)[:rows].to(HOST, copy=True)
        return whole

    def _whole(self, entry: Entry, part: Tensor) -> Tensor:
        if entry.split is Split.REPLICATED:
            return part
        return all_gather_whole(part, self.mesh, 1 if entry.split is Split.COLUMNS else 0)

    def _parts(self, entry: Entry, local: Tensor) -> tuple[Tensor, ...]:
        """This rank's share of each HF tensor that the parameter is made of."""
        if entry.split is not Split.ROWS:
            return (local,)
        heights = [expected_shape(source, self._model)[0] // self.mesh.tp_size for source in entry.sources]
        return local.split(heights)

    def state_dict(self) -> dict[str, Tensor]:
        """CPU copies of everything that a resumed run needs."""
        grad = torch.zeros(0) if self._grad is None else self._grad
        flats = {**self._flats(), "grad": grad}
        return {
            **{name: flat.detach().cpu().clone() for name, flat in flats.items()},
            "step": torch.tensor(self._optimizer.num_steps),
            "num_microbatches": torch.tensor(self.num_microbatches),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of :meth:`state_dict`.

        Raises:
            AdapterError: a tensor is missing or of another size; nothing was changed.
        """
        flats = self._flats()
        missing = sorted({*flats, "grad", "step", "num_microbatches"} - set(state))
        if missing:
            raise AdapterError(f"the saved state of the base model's training lacks {missing}")
        for name, flat in flats.items():
            if state[name].shape != flat.shape:
                raise AdapterError(
                    f"the base model's saved {name} has {state[name].numel()} elements, this rank has {flat.numel()}: "
                    f"it was saved with another model or parallel.tensor_parallel_size"
                )
        for name, flat in flats.items():
            flat.copy_(state[name])
        self._grad = state["grad"].to(self._optimizer.master.device, copy=True) if state["grad"].numel() else None
        self._optimizer.num_steps = int(state["step"])
        self.num_microbatches = int(state["num_microbatches"])
        self.publish()

    def _flats(self) -> dict[str, Tensor]:
        optimizer = self._optimizer
        return {"master": optimizer.master, "exp_avg": optimizer.exp_avg, "exp_avg_sq": optimizer.exp_avg_sq}


def _run(entry: Entry) -> int:
    """Which of the three runs of the flat vectors the parameter is in."""
    if entry.split is not Split.REPLICATED:
        return 2
    return 1 if entry.name.endswith(HEAD_NORMS) else 0
