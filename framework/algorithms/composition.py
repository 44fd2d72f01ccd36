"""A whole policy loss: policy term times correction, plus KL to the base model, minus entropy."""

from __future__ import annotations

from dataclasses import dataclass

from framework.algorithms.base import LossFn, LossInputs, LossOutput, Metric, token_metric
from framework.algorithms.corrections import Correction
from framework.algorithms.kl import KLEstimator
from framework.algorithms.ratios import with_proximal


@dataclass(frozen=True, slots=True, kw_only=True)
class KLTerm:
    """coef * KL(policy || base), estimated per token against ``fields["ref_logprobs"]``; see ``kl.py`` for caveats."""

    coef: float
    estimator: KLEstimator


@dataclass(frozen=True, slots=True, kw_only=True)
class ComposedLoss:
    """per_token = multiplier * policy + kl.coef * kl - entropy_coef * entropy.

    The correction scales the policy term alone, as in TRL and verl. With a correction the ratio is split in two,
    pi / pi_sampling = (pi / pi_proximal) (pi_proximal / pi_sampling): the policy term sees the first factor, the
    correction the second.
    """

    policy: LossFn
    correction: Correction | None = None
    kl: KLTerm | None = None
    entropy_coef: float = 0.0
    """Greater than 0 rewards entropy."""

    def __call__(self, inputs: LossInputs) -> LossOutput:
        if self.correction is not None:
            inputs = with_proximal(inputs)
        output = self.policy(inputs)
        per_token = output.per_token
        metrics: dict[str, Metric] = {**output.metrics, "policy/entropy": token_metric(inputs.entropy)}
        if self.correction is not None:
            correction = self.correction(inputs)
            per_token = correction.multipliers * per_token
            metrics.update(correction.metrics)
        if self.kl is not None:
            kl = self.kl.estimator(inputs.logprobs, inputs.fields["ref_logprobs"])
            per_token = per_token + self.kl.coef * kl
            metrics["policy/ref_kl"] = token_metric(kl)
        if self.entropy_coef:
            per_token = per_token - self.entropy_coef * inputs.entropy
        return LossOutput(per_token=per_token, metrics=metrics)
