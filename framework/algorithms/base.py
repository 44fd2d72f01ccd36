"""What a loss function takes and returns. Sums, weights and ranks are elsewhere.

Shapes: M = scored tokens of one microbatch, S = sequences (datums) of one microbatch. A sequence is never split
over microbatches, so sequence-level quantities can be formed here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

Aggregation = Literal["token_mean", "sequence_mean", "constant", "sum"]
"""How per-token losses become one number; the weights that do it are made in ``batching.aggregate``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """A mean that is not divided yet, so that microbatches and ranks can be added up first."""

    sum: float | Tensor
    count: float | Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class LossInputs:
    """Per scored token of one microbatch. Every ``[M]`` tensor is float32 unless said otherwise."""

    logprobs: Tensor
    """``[M]`` trainer logprobs of the target tokens, at the batch's temperature; carries gradient."""
    entropy: Tensor
    """``[M]`` entropy in nats of the trainer's distribution at each position; carries gradient."""
    weights: Tensor
    """``[M]`` what each token's loss is multiplied by before the sum; made once for the global batch."""
    sequence_ids: Tensor
    """``[M]`` int64 in [0, S): which sequence of this microbatch a token belongs to."""
    num_sequences: int
    """S."""
    fields: Mapping[str, Tensor]
    """The datums' other per-token values, ``[M]`` each, e.g. ``advantages``, ``sampling_logprobs``."""

    @property
    def advantages(self) -> Tensor:
        """``[M]``; KeyError if the batch has none."""
        return self.fields["advantages"]

    @property
    def sampling_logprobs(self) -> Tensor:
        """``[M]`` engine logprobs of the same tokens; KeyError if the batch has none."""
        return self.fields["sampling_logprobs"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LossOutput:
    """The loss before reduction: the trainer minimises ``(per_token * inputs.weights).sum()`` over all microbatches."""

    per_token: Tensor
    """``[M]`` with gradient."""
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    """Named ``area/what``, e.g. ``loss/clip_fraction``."""


LossFn = Callable[[LossInputs], LossOutput]


def sequence_sum(values: Tensor, inputs: LossInputs) -> Tensor:
    """Sum of ``values`` over each sequence's scored tokens.

    Args:
        values: ``[M]`` float32.
        inputs: supplies ``sequence_ids``.

    Returns:
        ``[S]`` float32; a sequence without scored tokens gives 0.
    """
    total = torch.zeros(inputs.num_sequences, dtype=values.dtype, device=values.device)
    return total.index_add(0, inputs.sequence_ids, values)


def sequence_mean(values: Tensor, inputs: LossInputs) -> Tensor:
    """Mean of ``values`` over each sequence's scored tokens.

    Args:
        values: ``[M]`` float32.
        inputs: supplies ``sequence_ids``.

    Returns:
        ``[S]`` float32; a sequence without scored tokens gives 0.
    """
    count = torch.bincount(inputs.sequence_ids, minlength=inputs.num_sequences).clamp(min=1)
    return sequence_sum(values, inputs) / count


def token_metric(values: Tensor) -> Metric:
    """The mean of ``values`` ``[M]`` over tokens, detached and not divided yet."""
    return Metric(sum=values.detach().sum(), count=float(values.numel()))
