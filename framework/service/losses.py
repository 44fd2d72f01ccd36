"""The tinker losses: which inputs and config keys each takes, and its formula.

The protocol sums over all tokens, so every weight is 1 except those of ``cross_entropy``, which are the caller's.
Formulas: protocol page, section 8.2. lp are the trainer's logprobs, q the sampler's, A the advantages,
r = exp(lp - q).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from framework.algorithms.base import LossFn, LossInputs, LossOutput, sequence_mean
from framework.service.ops import LossSpec, RequestError


@dataclass(frozen=True, slots=True, kw_only=True)
class LossRule:
    """What a loss needs besides ``target_tokens``."""

    build: Callable[[Mapping[str, float]], LossFn]
    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    config: Mapping[str, float] = field(default_factory=dict)
    """Keys with their defaults."""


CLIP = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}
"""Bounds of the ratio itself, not its distance from 1."""
_RL = ("logprobs", "advantages")


def _ratio(x: LossInputs) -> torch.Tensor:
    return torch.exp(x.logprobs - x.fields["logprobs"])


def _clipped(ratio: torch.Tensor, config: Mapping[str, float]) -> torch.Tensor:
    return ratio.clamp(config["clip_low_threshold"], config["clip_high_threshold"])


def _cross_entropy(config: Mapping[str, float]) -> LossFn:
    return lambda x: LossOutput(per_token=-x.logprobs)


def _importance_sampling(config: Mapping[str, float]) -> LossFn:
    return lambda x: LossOutput(per_token=-_ratio(x) * x.fields["advantages"])


def _pessimistic(ratio: torch.Tensor, x: LossInputs, config: Mapping[str, float]) -> LossOutput:
    advantages = x.fields["advantages"]
    return LossOutput(per_token=-torch.minimum(ratio * advantages, _clipped(ratio, config) * advantages))


def _ppo(config: Mapping[str, float]) -> LossFn:
    return lambda x: _pessimistic(_ratio(x), x, config)


def _cispo(config: Mapping[str, float]) -> LossFn:
    return lambda x: LossOutput(
        per_token=-_clipped(_ratio(x), config).detach() * x.logprobs * x.fields["advantages"]
    )


def _dro(config: Mapping[str, float]) -> LossFn:
    def loss(x: LossInputs) -> LossOutput:
        distance = x.logprobs - x.fields["logprobs"]
        return LossOutput(per_token=-(x.logprobs * x.fields["advantages"] - 0.5 * config["beta"] * distance**2))

    return loss


def _gspo(config: Mapping[str, float]) -> LossFn:
    def loss(x: LossInputs) -> LossOutput:
        mask = x.fields["sequence_ratio_mask"]
        held = x.logprobs.detach()
        total = sequence_mean((held - x.fields["logprobs"]) * mask, x)
        share = sequence_mean(mask, x).clamp(min=1e-9)
        ratio = torch.exp((total / share)[x.sequence_ids] + x.logprobs - held)
        return _pessimistic(ratio, x, config)

    return loss


LOSSES: Mapping[str, LossRule] = {
    "cross_entropy": LossRule(build=_cross_entropy, optional=("weights",)),
    "importance_sampling": LossRule(build=_importance_sampling, required=_RL),
    "ppo": LossRule(build=_ppo, required=_RL, config=CLIP),
    "cispo": LossRule(build=_cispo, required=_RL, config=CLIP),
    "dro": LossRule(build=_dro, required=_RL, config={"beta": 0.05}),
    "gspo": LossRule(build=_gspo, required=(*_RL, "sequence_ratio_mask"), config=CLIP),
}


def loss_spec(name: str, config: Mapping[str, float | str]) -> LossSpec:
    """The loss with its defaults filled in.

    Raises:
        RequestError: an unknown loss, an unknown key, or a value that is not a number.
    """
    rule = LOSSES.get(name)
    if rule is None:
        raise RequestError(f"loss_fn={name!r} is not supported; supported are {sorted(LOSSES)}")
    unknown = sorted(set(config) - set(rule.config))
    if unknown:
        raise RequestError(f"loss_fn_config of {name} has unknown keys {unknown}; allowed are {sorted(rule.config)}")
    for key, value in config.items():
        if isinstance(value, str) or not abs(value) < float("inf"):
            raise RequestError(f"loss_fn_config[{key!r}]={value!r} must be a finite number")
    return LossSpec(name=name, config={**rule.config, **{key: float(value) for key, value in config.items()}})


def build_loss(spec: LossSpec) -> LossFn:
    """The loss as the trainer takes it; a loss that is not finite raises before any gradient is made."""
    inner = LOSSES[spec.name].build(spec.config)

    def finite(inputs: LossInputs) -> LossOutput:
        output = inner(inputs)
        if not torch.isfinite((output.per_token * inputs.weights).sum()):
            raise RequestError(
                f"the {spec.name} loss is not finite; look at the logprobs, advantages and weights of the batch"
            )
        return output

    return finite
