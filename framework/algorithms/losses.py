"""Policy losses: what is minimised per trained token. Each is a frozen dataclass, called as a ``LossFn``.

They read ``fields["advantages"]`` and the ratio's denominator (see ``ratios.py``). Masks, means, corrections, KL and
entropy are elsewhere: the trainer multiplies by ``inputs.weights`` and sums, ``composition.py`` adds the rest.
Notation: lp = logprobs (gradient), r = ratio to the behaviour policy, A = advantage, sg = stop-gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from framework.algorithms.base import LossInputs, LossOutput, Metric, token_metric
from framework.algorithms.ratios import behaviour_logprobs, sequence_ratio, token_ratio
from framework.errors import ConfigError


def clipped_surrogate(ratio: Tensor, advantages: Tensor, *, low: float, high: float) -> Tensor:
    """-min(r A, clip(r, low, high) A): PPO (Schulman et al. 2017, arXiv 1707.06347, eq. 7).

    Args:
        ratio: ``[M]`` with gradient.
        advantages: ``[M]``.
        low: lower bound of the ratio, 1 - epsilon_low.
        high: upper bound of the ratio, 1 + epsilon_high.

    Returns:
        ``[M]``; the gradient is zero where A > 0 and r > high, and where A < 0 and r < low.
    """
    return -torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)


def _clip_metrics(ratio: Tensor, advantages: Tensor, low: float, high: float) -> dict[str, Metric]:
    return {
        "loss/ratio": token_metric(ratio),
        "loss/clip_low_fraction": token_metric(((ratio < low) & (advantages < 0)).float()),
        "loss/clip_high_fraction": token_metric(((ratio > high) & (advantages > 0)).float()),
    }


def _check_clip(clip_low: float, clip_high: float) -> None:
    if not 0.0 <= clip_low <= 1.0 or clip_high < 0.0:
        raise ConfigError(
            f"algorithm.clip_low={clip_low}, algorithm.clip_high={clip_high}: the ratio is kept in "
            "[1 - clip_low, 1 + clip_high], with clip_low in [0, 1] and clip_high at least 0"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PPOClip:
    """PPO's clipped surrogate, the loss of GRPO (DeepSeekMath eq. 3); clip-higher is DAPO eq. 8 (arXiv 2503.14476).

    Example: ``PPOClip(clip_low=0.2, clip_high=0.28)(inputs).per_token``
    """

    clip_low: float = 0.2
    """The ratio's lower bound is 1 - clip_low."""
    clip_high: float = 0.2
    """The ratio's upper bound is 1 + clip_high."""
    dual_clip: float | None = None
    """c > 1: where A < 0 the objective is at least c A (dual-clip PPO, Ye et al. 2020, arXiv 1912.09729)."""

    def __post_init__(self) -> None:
        _check_clip(self.clip_low, self.clip_high)
        if self.dual_clip is not None and self.dual_clip <= 1.0:
            raise ConfigError(f"algorithm.dual_clip={self.dual_clip}: must be greater than 1, or null")

    def __call__(self, inputs: LossInputs) -> LossOutput:
        low, high, advantages = 1.0 - self.clip_low, 1.0 + self.clip_high, inputs.advantages
        ratio = token_ratio(inputs.logprobs, behaviour_logprobs(inputs))
        per_token = clipped_surrogate(ratio, advantages, low=low, high=high)
        metrics = _clip_metrics(ratio, advantages, low, high)
        if self.dual_clip is not None:
            bound = -self.dual_clip * advantages
            bounded = (advantages < 0) & (per_token > bound)
            per_token = torch.where(bounded, bound, per_token)
            metrics["loss/dual_clip_fraction"] = token_metric(bounded.float())
        return LossOutput(per_token=per_token, metrics=metrics)


@dataclass(frozen=True, slots=True, kw_only=True)
class GSPO:
    """Sequence-level ratio and clip: GSPO (Zheng et al. 2025, arXiv 2507.18071, eq. 5 and 7).

    s_i = (pi(y_i) / pi_behaviour(y_i))^(1 / |y_i|); every token of sequence i carries -min(s_i A, clip(s_i) A), so with
    ``sequence_mean`` the sum is the paper's mean over sequences.
    """

    clip_low: float = 3e-4
    clip_high: float = 4e-4

    def __post_init__(self) -> None:
        _check_clip(self.clip_low, self.clip_high)

    def __call__(self, inputs: LossInputs) -> LossOutput:
        low, high = 1.0 - self.clip_low, 1.0 + self.clip_high
        ratio = sequence_ratio(inputs.logprobs, behaviour_logprobs(inputs), inputs)
        per_token = clipped_surrogate(ratio, inputs.advantages, low=low, high=high)
        return LossOutput(per_token=per_token, metrics=_clip_metrics(ratio, inputs.advantages, low, high))


@dataclass(frozen=True, slots=True, kw_only=True)
class GSPOToken:
    """GSPO-token (arXiv 2507.18071, eq. 13 and 14): s_it = sg(s_i) lp_t / sg(lp_t), the ratio of probabilities.

    The value of s_it is s_i, its gradient that of this token alone, so advantages may differ within a sequence. With
    equal advantages and weights within a sequence, total and gradient are :class:`GSPO`'s.
    """

    clip_low: float = 3e-4
    clip_high: float = 4e-4

    def __post_init__(self) -> None:
        _check_clip(self.clip_low, self.clip_high)

    def __call__(self, inputs: LossInputs) -> LossOutput:
        low, high = 1.0 - self.clip_low, 1.0 + self.clip_high
        fixed = inputs.logprobs.detach()
        ratio = sequence_ratio(fixed, behaviour_logprobs(inputs), inputs) * torch.exp(inputs.logprobs - fixed)
        per_token = clipped_surrogate(ratio, inputs.advantages, low=low, high=high)
        return LossOutput(per_token=per_token, metrics=_clip_metrics(ratio, inputs.advantages, low, high))


@dataclass(frozen=True, slots=True, kw_only=True)
class CISPO:
    """-sg(clip(r)) A lp: CISPO (MiniMax-M1, arXiv 2506.13585, eq. 4 and 5). No token loses its gradient.

    The paper clips only from above (``clip_low=1`` bounds the ratio by 0 from below) and does not publish the bound;
    the default 1 + 4 = 5 is that of ScaleRL (Khatri et al. 2025, arXiv 2510.13786).
    """

    clip_low: float = 1.0
    clip_high: float = 4.0

    def __post_init__(self) -> None:
        _check_clip(self.clip_low, self.clip_high)

    def __call__(self, inputs: LossInputs) -> LossOutput:
        low, high = 1.0 - self.clip_low, 1.0 + self.clip_high
        ratio = token_ratio(inputs.logprobs.detach(), behaviour_logprobs(inputs))
        per_token = -ratio.clamp(low, high) * inputs.advantages * inputs.logprobs
        metrics: Mapping[str, Metric] = {
            "loss/ratio": token_metric(ratio),
            "loss/clip_low_fraction": token_metric((ratio < low).float()),
            "loss/clip_high_fraction": token_metric((ratio > high).float()),
        }
        return LossOutput(per_token=per_token, metrics=metrics)


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportanceSampling:
    """-r A: the policy gradient with an importance ratio and no clip. At r = 1 its gradient is REINFORCE's."""

    def __call__(self, inputs: LossInputs) -> LossOutput:
        ratio = token_ratio(inputs.logprobs, behaviour_logprobs(inputs))
        return LossOutput(per_token=-ratio * inputs.advantages, metrics={"loss/ratio": token_metric(ratio)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Reinforce:
    """-A lp: REINFORCE (Williams 1992). It takes the sample as on-policy: correct a gap with ``corrections.py``."""

    def __call__(self, inputs: LossInputs) -> LossOutput:
        return LossOutput(per_token=-inputs.advantages * inputs.logprobs)


@dataclass(frozen=True, slots=True, kw_only=True)
class DRO:
    """-(A lp - beta / 2 (lp - q)^2) with q the behaviour logprobs: the quadratic penalty of DRO (Richemond et al. 2024,
    arXiv 2405.19107) with A in place of reward minus value."""

    beta: float

    def __post_init__(self) -> None:
        if self.beta <= 0.0:
            raise ConfigError(f"beta={self.beta} of the dro loss must be greater than 0")

    def __call__(self, inputs: LossInputs) -> LossOutput:
        log_ratio = inputs.logprobs - behaviour_logprobs(inputs)
        per_token = -(inputs.advantages * inputs.logprobs - 0.5 * self.beta * log_ratio.square())
        return LossOutput(per_token=per_token, metrics={"loss/log_ratio": token_metric(log_ratio)})
