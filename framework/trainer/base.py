"""The trainer's Protocol. Recipes and the service know only this; pair.py picks the backend.

Every method is collective: all ranks of the tensor-parallel group call it, in the same order, with the same
arguments. With data parallelism, ``forward_backward`` takes this replica's share of the batch and ``optim_step``
adds the shares up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from framework.algorithms.base import LossFn, Metric
from framework.batching import Batch
from framework.lora.spec import LoraSpec
from framework.types import AdamParams


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraShard:
    """One projection's factors on this rank, in the engine's dtype, the scale already multiplied into ``b``.

    They are views of the trainer's working copy: valid until the next ``optim_step`` of this adapter.
    """

    a: Tensor
    """``[rank, in_local]``: whole for column-parallel projections, a column shard for o_proj and down_proj."""
    b: Tensor
    """``[out_local, rank]``: a row shard for column-parallel projections, whole for o_proj and down_proj."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardResult:
    """Per-datum results in the order of the batch's datums, of this data-parallel replica."""

    logprobs: tuple[npt.NDArray[np.float32], ...]
    """One ``[scored tokens of the datum]`` float32 array per datum."""
    entropy: tuple[npt.NDArray[np.float32], ...]
    """Likewise, in nats."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardBackwardResult:
    """What one accumulation call computed. Its gradient has been added to the adapter's."""

    loss: float
    """``sum(per_token * weights)`` over this replica's share."""
    metrics: Mapping[str, Metric]
    """The loss function's metrics, added up over microbatches, not yet over replicas."""
    result: ForwardResult


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimResult:
    """What one optimizer step saw."""

    grad_norm: float
    """Global L2 norm of the adapter's gradient before clipping, the same on every rank."""
    step: int
    """How many steps this adapter has made, this one included."""


class Trainer(Protocol):
    """Trains any number of adapters of one frozen base model, or that model itself.

    What :meth:`train_base` names is trained, saved and loaded by the methods that take an adapter's name.
    """

    @property
    def token_multiple(self) -> int:
        """Microbatches must have a multiple of this many tokens; see ``batching.pack``."""

    def add_adapter(self, name: str, spec: LoraSpec, *, seed: int) -> None:
        """Creates an adapter: A Kaiming-uniform from ``seed`` (the same values for every tensor-parallel size), B zero.

        Raises:
            AdapterError: the name is taken, or the spec does not fit the model.
        """

    def remove_adapter(self, name: str) -> None: ...

    def adapters(self) -> Mapping[str, LoraSpec]: ...

    def train_base(self, name: str) -> None:
        """Full fine-tuning: ``name`` is the base model's own parameters from now on, which optim_step writes in place.

        There are no adapters beside it, and no base model to compare with.

        Raises:
            AdapterError: there is an adapter.
            ConfigError: this backend trains adapters only.
        """

    def base_weights(self) -> Mapping[str, Tensor]:
        """This rank's base parameters by the layout's names: the very tensors the forward pass reads."""

    def export_base(self, name: str) -> Mapping[str, Tensor]:
        """The whole weights by HF name, in their dtype, on the CPU of every rank."""

    def forward(self, name: str | None, batch: Batch) -> ForwardResult:
        """Logprobs and entropy without gradient; ``name=None`` is the base model, the adapter off."""

    def forward_backward(self, name: str, batch: Batch, loss_fn: LossFn) -> ForwardBackwardResult:
        """Adds the gradient of this batch's loss to the adapter's. A failed call adds nothing."""

    def optim_step(self, name: str, params: AdamParams) -> OptimResult:
        """One AdamW step on the fp32 masters from the accumulated gradient, which is cleared.

        A gradient whose norm is not finite is dropped instead: nothing else changes, and ``grad_norm`` says so.
        """

    def zero_grad(self, name: str) -> None: ...

    def adapter_shards(self, name: str) -> Mapping[str, LoraShard]:
        """This rank's factors by HF module path, e.g. ``model.layers.3.self_attn.q_proj``, in module order."""

    def export_adapter(self, name: str) -> Mapping[str, npt.NDArray[np.float32]]:
        """The whole fp32 factors, unscaled, as PEFT names them (``<module path>.lora_A.weight``), on every rank."""

    def import_adapter(self, name: str, tensors: Mapping[str, npt.NDArray[np.float32]]) -> None:
        """Overwrites the factors of an existing adapter with whole tensors named as by :meth:`export_adapter`.

        The optimizer starts fresh.

        Raises:
            AdapterError: a tensor is missing, unknown, or of another shape; nothing was changed.
        """

    def state_dict(self, name: str) -> dict[str, Tensor]:
        """This rank's masters, Adam moments, accumulated gradient and step count, as CPU copies."""

    def load_state_dict(self, name: str, state: Mapping[str, Tensor]) -> None:
        """The exact inverse of :meth:`state_dict`, for the same spec and tensor-parallel size."""
