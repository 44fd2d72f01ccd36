"""The service's guard around the tinker losses of :mod:`framework.algorithms.tinker`."""

from __future__ import annotations

import torch

from framework.algorithms.base import LossFn, LossInputs, LossOutput
from framework.algorithms.tinker import tinker_loss
from framework.service.ops import LossSpec, RequestError


def build_loss(spec: LossSpec) -> LossFn:
    """The loss as the trainer takes it; a loss that is not finite raises before any gradient is made."""
    inner = tinker_loss(spec.name, fields=frozenset(spec.fields), config=spec.config)

    def finite(inputs: LossInputs) -> LossOutput:
        output = inner(inputs)
        if not torch.isfinite((output.per_token * inputs.weights).sum()):
            raise RequestError(
                f"the {spec.name} loss is not finite; look at the logprobs, advantages and weights of the batch"
            )
        return output

    return finite
