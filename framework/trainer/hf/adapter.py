"""One adapter of the reference trainer: fp32 masters, their gradient and AdamW, and PEFT's weights as a working copy.

All A come first, then all B, in one flat vector per quantity, so that what is scaled is contiguous:

    master   fp32, what ``torch.optim.AdamW`` updates and checkpoints keep
    weights  model dtype: master, B times the scale. PEFT's parameters are views of it, PEFT's own scaling is 1, so what
             the forward computes with is what the engine is given, bit for bit
    grad     fp32, with respect to ``master``: that of ``weights``, B's part times the scale
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from framework.errors import AdapterError, CheckpointError
from framework.lora.init import init_a
from framework.lora.spec import LoraSpec
from framework.models.layout import Projection
from framework.trainer.base import LoraShard, OptimResult
from framework.types import AdamParams


@dataclass(frozen=True, slots=True, kw_only=True)
class Factor:
    """Where one factor lies in the flat vectors, and the PEFT parameter that shows it."""

    path: str
    """HF module path."""
    letter: str
    """``A`` or ``B``."""
    parameter: nn.Parameter
    offset: int

    @property
    def name(self) -> str:
        """PEFT's name of the tensor."""
        return f"{self.path}.lora_{self.letter}.weight"

    def view(self, flat: Tensor) -> Tensor:
        """The factor inside ``flat``, as a matrix."""
        return flat[self.offset : self.offset + self.parameter.numel()].view(self.parameter.shape)


class HfAdapter:
    """Factors, gradient and optimizer of one adapter."""

    def __init__(
        self, spec: LoraSpec, places: Sequence[tuple[Projection, nn.Parameter, nn.Parameter]], *, seed: int
    ) -> None:
        """Takes over PEFT's parameters.

        Args:
            spec: of the adapter.
            places: each projection with PEFT's A ``[rank, in]`` and B ``[out, rank]``, in module order.
            seed: of A's initial values.
        """
        self.spec = spec
        self.factors: list[Factor] = []
        offset = 0
        for letter, parameters in (("A", [a for _, a, _ in places]), ("B", [b for _, _, b in places])):
            self._b_start = offset  # of the last letter
            for (projection, _, _), parameter in zip(places, parameters, strict=True):
                self.factors.append(Factor(path=projection.path, letter=letter, parameter=parameter, offset=offset))
                offset += parameter.numel()
        first = self.factors[0].parameter
        self.master = nn.Parameter(torch.zeros(offset, device=first.device))
        self.grad = torch.zeros(offset, device=first.device)
        self.weights = torch.zeros(offset, dtype=first.dtype, device=first.device)
        for factor in self.factors:
            factor.parameter.data = factor.view(self.weights)
        for factor in self.factors[: len(places)]:
            a = init_a(factor.path, rank=spec.rank, in_features=factor.parameter.shape[1], seed=seed)
            factor.view(self.master.data).copy_(a)
        self._start_optimizer()
        self.publish()

    @property
    def parameters(self) -> list[nn.Parameter]:
        """PEFT's parameters, in the order of the flat vectors."""
        return [factor.parameter for factor in self.factors]

    def publish(self) -> None:
        """Refreshes the working copy from the masters."""
        self.weights.copy_(self.master.data)
        self.weights[self._b_start :] = self.master.data[self._b_start :] * self.spec.scale

    def flatten(self, gradients: Sequence[Tensor]) -> Tensor:
        """Gradients of :attr:`parameters` as one fp32 vector with respect to the masters."""
        flat = torch.cat([gradient.float().flatten() for gradient in gradients])
        flat[self._b_start :] *= self.spec.scale
        return flat

    def optim_step(self, params: AdamParams) -> OptimResult:
        """Clips as ``torch.nn.utils.clip_grad_norm_`` does, steps AdamW, publishes, clears.

        A gradient whose norm is not finite is dropped, and nothing else changes.
        """
        norm = torch.nn.utils.get_total_norm([self.grad])
        if not norm.isfinite():
            self.grad.zero_()
            return OptimResult(grad_norm=norm.item(), step=self.step)
        self.master.grad = self.grad
        if params.max_grad_norm > 0.0:
            torch.nn.utils.clip_grads_with_norm_(self.master, params.max_grad_norm, norm)
        self._optimizer.param_groups[0].update(
            lr=params.learning_rate,
            betas=(params.beta1, params.beta2),
            eps=params.eps,
            weight_decay=params.weight_decay,
        )
        self._optimizer.step()
        self.grad.zero_()
        self.publish()
        return OptimResult(grad_norm=norm.item(), step=self.step)

    @property
    def step(self) -> int:
        """Optimizer steps made."""
        return int(self._moments["step"].item())

    def shards(self) -> dict[str, LoraShard]:
        """Views of the working copy, in module order."""
        half = len(self.factors) // 2
        pairs = zip(self.factors[:half], self.factors[half:], strict=True)
        return {a.path: LoraShard(a=a.view(self.weights), b=b.view(self.weights)) for a, b in pairs}

    def named(self) -> Iterator[tuple[str, Tensor]]:
        """PEFT's name and the fp32 master of every factor."""
        for factor in self.factors:
            yield factor.name, factor.view(self.master.data)

    def overwrite(self, whole: Mapping[str, Tensor]) -> None:
        """Sets the masters; the optimizer starts fresh.

        Raises:
            AdapterError: a tensor is missing, unknown, or of another shape; nothing was changed.
        """
        own = dict(self.named())
        if own.keys() != whole.keys():
            odd = sorted(own.keys() ^ whole.keys())
            raise AdapterError(f"these tensors are missing or unknown: {odd[:6]} ({len(odd)} in all)")
        for name, tensor in own.items():
            if whole[name].shape != tensor.shape:
                raise AdapterError(f"{name} has shape {list(whole[name].shape)}, must be {list(tensor.shape)}")
        for name, tensor in own.items():
            tensor.copy_(whole[name])
        self.grad.zero_()
        self._start_optimizer()
        self.publish()

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of everything that a resumed run needs; what restores is :meth:`load_state_dict`."""
        return {name: torch.from_numpy(flat.numpy(force=True).copy()) for name, flat in self._state().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of :meth:`state_dict`.

        Raises:
            CheckpointError: an entry is missing or has another size; nothing was changed.
        """
        for name, flat in self._state().items():
            if name not in state or state[name].shape != flat.shape:
                given = list(state[name].shape) if name in state else "missing"
                raise CheckpointError(f"adapter state {name!r} is {given}, must be {list(flat.shape)}")
        for name, flat in self._state().items():
            flat.copy_(state[name])
        self.publish()

    def _state(self) -> dict[str, Tensor]:
        return {"master": self.master.data, "grad": self.grad, **self._moments}

    def _start_optimizer(self) -> None:
        """A fresh AdamW. Its moments are made here and not at its first step, so that they can always be saved."""
        self._optimizer = torch.optim.AdamW([self.master])
        self._moments = {
            "step": torch.tensor(0.0),
            "exp_avg": torch.zeros_like(self.grad),
            "exp_avg_sq": torch.zeros_like(self.grad),
        }
        self._optimizer.state[self.master] = self._moments
