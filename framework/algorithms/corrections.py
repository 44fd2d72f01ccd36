"""Corrections for the gap between the engine that sampled and the trainer that learns: a multiplier per token.

With k_t = pi_proximal / pi_sampling (the same weights in two numerical stacks, or a policy some steps older), the
policy loss of token t is multiplied by a function of k, without gradient. Multipliers of 0 leave the token in the
denominators of ``batching.aggregate``, which are counted before the trainer has run: masking shrinks the step.

Each is a frozen dataclass called with inputs that have ``proximal_logprobs`` (``ratios.with_proximal``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from framework.algorithms.base import LossInputs, Metric, sequence_mean, sequence_sum, token_metric
from framework.algorithms.ratios import MAX_LOG_RATIO
from framework.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class CorrectionOutput:
    """What the policy loss is multiplied by."""

    multipliers: Tensor
    """``[M]`` float32, no gradient, at least 0."""
    metrics: Mapping[str, Metric] = field(default_factory=dict)


Correction = Callable[[LossInputs], CorrectionOutput]


def log_gap(inputs: LossInputs) -> Tensor:
    """log k_t = proximal_logprobs - sampling_logprobs, ``[M]``, without gradient."""
    return (inputs.fields["proximal_logprobs"] - inputs.sampling_logprobs).detach()


def _output(multipliers: Tensor) -> CorrectionOutput:
    metrics = {
        "policy/correction_multiplier": token_metric(multipliers),
        "policy/correction_masked_fraction": token_metric((multipliers == 0.0).float()),
    }
    return CorrectionOutput(multipliers=multipliers, metrics=metrics)


def _check_range(low: float, high: float) -> None:
    if not 0.0 <= low < high:
        raise ConfigError(
            f"algorithm.correction_low={low}, algorithm.correction_high={high}: they bound a ratio of probabilities, "
            "0 <= low < high"
        )


def _exp(log_ratio: Tensor) -> Tensor:
    return torch.exp(log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO))


@dataclass(frozen=True, slots=True, kw_only=True)
class TruncatedImportance:
    """min(k_t, high): truncated importance sampling per token (Yao et al. 2025, "Your Efficient RL Framework Secretly
    Brings You Off-Policy RL Training"; the estimator is Ionides 2008)."""

    high: float = 2.0

    def __post_init__(self) -> None:
        _check_range(0.0, self.high)

    def __call__(self, inputs: LossInputs) -> CorrectionOutput:
        ratio = _exp(log_gap(inputs))
        output = _output(ratio.clamp(max=self.high))
        truncated = {"policy/correction_truncated_fraction": token_metric((ratio > self.high).float())}
        return CorrectionOutput(multipliers=output.multipliers, metrics={**output.metrics, **truncated})


@dataclass(frozen=True, slots=True, kw_only=True)
class IcePop:
    """k_t where low <= k_t <= high, else 0: IcePop (Ling Team 2025, arXiv 2510.18855, the function M(k))."""

    low: float = 0.5
    high: float = 5.0

    def __post_init__(self) -> None:
        _check_range(self.low, self.high)

    def __call__(self, inputs: LossInputs) -> CorrectionOutput:
        ratio = _exp(log_gap(inputs))
        return _output(torch.where((ratio >= self.low) & (ratio <= self.high), ratio, 0.0))


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceMaskedImportance:
    """K_i = product of the sequence's k_t, where low <= K_i <= high, else 0; every token of i gets it.

    Sequence-level masked importance sampling (Liu et al. 2025, "When Speed Kills Stability: Demystifying RL Collapse
    from the Training-Inference Mismatch"). The product is that of the sequence's trained tokens: long sequences leave
    the range by length alone.
    """

    low: float = 0.0
    high: float = 2.0

    def __post_init__(self) -> None:
        _check_range(self.low, self.high)

    def __call__(self, inputs: LossInputs) -> CorrectionOutput:
        ratio = _exp(sequence_sum(log_gap(inputs), inputs))
        kept = torch.where((ratio >= self.low) & (ratio <= self.high), ratio, 0.0)
        return _output(kept[inputs.sequence_ids])


@dataclass(frozen=True, slots=True, kw_only=True)
class GeometricMask:
    """1 where the geometric mean of the sequence's k_t is in [low, high], else 0: rejection that knows no length.

    Liu et al. 2025 (see :class:`SequenceMaskedImportance`), verl's ``seq_mean_k1`` rejection.
    """

    low: float = 0.99
    high: float = 1.01

    def __post_init__(self) -> None:
        _check_range(self.low, self.high)

    def __call__(self, inputs: LossInputs) -> CorrectionOutput:
        ratio = _exp(sequence_mean(log_gap(inputs), inputs))
        kept = ((ratio >= self.low) & (ratio <= self.high)).to(ratio.dtype)
        return _output(kept[inputs.sequence_ids])


@dataclass(frozen=True, slots=True, kw_only=True)
class OffPolicyMask:
    """0 for a sequence of negative advantage whose mean(sampling_logprobs - logprobs) exceeds ``high``, else 1.

    Off-policy sequence masking (DeepSeek-V3.2, arXiv 2512.02556). It looks at the trainer's logprobs now,
    so it also sees how far the policy has moved since the sample. A token's own advantage decides its sign.
    """

    high: float = 0.5
    """Largest mean log ratio in nats per token; the paper publishes none, TRL suggests this one."""

    def __post_init__(self) -> None:
        if self.high <= 0.0:
            raise ConfigError(f"algorithm.correction_high={self.high}: must be greater than 0 nats for off_policy_mask")

    def __call__(self, inputs: LossInputs) -> CorrectionOutput:
        drift = sequence_mean(inputs.sampling_logprobs - inputs.logprobs.detach(), inputs)
        masked = (inputs.advantages < 0) & (drift > self.high)[inputs.sequence_ids]
        return _output((~masked).to(drift.dtype))
