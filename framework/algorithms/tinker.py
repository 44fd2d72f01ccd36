"""The losses of the tinker wire protocol by name, made of the same functions as the recipes' losses.

A tinker loss is a *sum* over all tokens of all datums (aggregation ``sum``), every position is scored, and the ratio's
denominator is the sampler's logprobs that the client sends (``proximal_logprobs`` would be an unknown field). Clip
thresholds are bounds of the ratio (0.8, 1.2), not distances from 1. The service renames the wire's ``logprobs`` to
``sampling_logprobs``; every other input keeps its name as a datum's field. Values are validated before a batch is made:
a wrong key is the user's error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from framework.algorithms.base import LossFn, LossInputs, LossOutput, sequence_sum
from framework.algorithms.losses import DRO, ImportanceSampling, clipped_surrogate
from framework.algorithms.ratios import MAX_LOG_RATIO, token_ratio
from framework.algorithms.supervised import CrossEntropy, WeightedCrossEntropy
from framework.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class RatioClip:
    """``ppo``: -min(r A, clip(r, low, high) A)."""

    low: float
    high: float

    def __call__(self, inputs: LossInputs) -> LossOutput:
        ratio = token_ratio(inputs.logprobs, inputs.sampling_logprobs)
        return LossOutput(per_token=clipped_surrogate(ratio, inputs.advantages, low=self.low, high=self.high))


@dataclass(frozen=True, slots=True, kw_only=True)
class RatioCISPO:
    """``cispo``: -sg(clip(r, low, high)) lp A."""

    low: float
    high: float

    def __call__(self, inputs: LossInputs) -> LossOutput:
        ratio = token_ratio(inputs.logprobs.detach(), inputs.sampling_logprobs)
        return LossOutput(per_token=-ratio.clamp(self.low, self.high) * inputs.logprobs * inputs.advantages)


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskedGSPO:
    """``gspo``: s = exp(mean over ``sequence_ratio_mask`` of (sg(lp) - q)) exp(lp - sg(lp)), clipped as ``ppo``."""

    low: float
    high: float

    def __call__(self, inputs: LossInputs) -> LossOutput:
        mask, fixed = inputs.fields["sequence_ratio_mask"], inputs.logprobs.detach()
        count = sequence_sum(mask, inputs).clamp(min=1.0)
        mean = sequence_sum(mask * (fixed - inputs.sampling_logprobs), inputs) / count
        sequence = torch.exp(mean.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO))[inputs.sequence_ids]
        ratio = sequence * torch.exp(inputs.logprobs - fixed)
        return LossOutput(per_token=clipped_surrogate(ratio, inputs.advantages, low=self.low, high=self.high))


@dataclass(frozen=True, slots=True, kw_only=True)
class TinkerLoss:
    """One entry of the protocol's table: what a datum must bring, what may be configured."""

    fields: tuple[str, ...]
    """Required per-token fields, besides the target tokens."""
    config: Mapping[str, float]
    """Every configuration key and its default."""
    make: Callable[..., LossFn]
    """Called with the configuration's values in the order of ``config``."""


_RATIO_FIELDS = ("sampling_logprobs", "advantages")
_RATIO_BOUNDS = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}

TINKER_LOSSES: Mapping[str, TinkerLoss] = {
    "cross_entropy": TinkerLoss(fields=(), config={}, make=CrossEntropy),
    "importance_sampling": TinkerLoss(fields=_RATIO_FIELDS, config={}, make=ImportanceSampling),
    "ppo": TinkerLoss(fields=_RATIO_FIELDS, config=_RATIO_BOUNDS, make=lambda low, high: RatioClip(low=low, high=high)),
    "cispo": TinkerLoss(
        fields=_RATIO_FIELDS, config=_RATIO_BOUNDS, make=lambda low, high: RatioCISPO(low=low, high=high)
    ),
    "dro": TinkerLoss(fields=_RATIO_FIELDS, config={"beta": 0.05}, make=lambda beta: DRO(beta=beta)),
    "gspo": TinkerLoss(
        fields=(*_RATIO_FIELDS, "sequence_ratio_mask"),
        config=_RATIO_BOUNDS,
        make=lambda low, high: MaskedGSPO(low=low, high=high),
    ),
}
"""The public losses of the protocol. ``cross_entropy`` takes an optional field ``weights`` (missing: 1)."""


def tinker_loss(name: str, *, fields: frozenset[str], config: Mapping[str, float]) -> LossFn:
    """The loss of one forward_backward request.

    Args:
        name: ``loss_fn`` on the wire.
        fields: the per-token fields that every datum of the request has, target tokens excluded.
        config: ``loss_fn_config`` on the wire.

    Raises:
        ConfigError: the loss is unknown, a field is missing or unknown, or a key or value is not allowed.
    """
    if name not in TINKER_LOSSES:
        raise ConfigError(f"loss_fn={name!r} is not supported; one of {', '.join(TINKER_LOSSES)}")
    loss = TINKER_LOSSES[name]
    optional = {"weights"} if name == "cross_entropy" else set()
    missing, unknown = set(loss.fields) - fields, fields - set(loss.fields) - optional
    if missing or unknown:
        raise ConfigError(
            f"loss_fn={name!r} takes the loss_fn_inputs {sorted({*loss.fields, *optional})}; "
            f"missing {sorted(missing)}, unknown {sorted(unknown)}"
        )
    if set(config) - set(loss.config):
        raise ConfigError(f"loss_fn_config keys of {name!r} are {sorted(loss.config)}, got {sorted(config)}")
    values = {**loss.config, **config}
    if "clip_low_threshold" in values and not 0 <= values["clip_low_threshold"] <= values["clip_high_threshold"]:
        raise ConfigError(f"loss_fn_config={dict(values)}: thresholds bound the ratio, 0 <= low <= high")
    if "weights" in fields:
        return WeightedCrossEntropy()
    return loss.make(*values.values())
