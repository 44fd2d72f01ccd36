"""Estimators of KL(policy || reference) from one sampled token, and the KL term of a loss.

With d = logprobs - ref_logprobs (Schulman, "Approximating KL divergence", 2020): k1 = d, k2 = d^2 / 2,
k3 = exp(-d) - 1 + d. Sampled from the policy, k1 and k3 are unbiased for the value of the KL, k2 is not.

As a *loss* the gradient matters, not the value, and there the order is reversed (Tang and Munos 2025, arXiv 2506.09477;
on-policy samples): the expected gradient of k1 is zero, so it regularises nothing; that of k2 is the gradient of
KL(policy || reference); that of k3 is the gradient of KL(reference || policy), the other direction. GRPO (DeepSeekMath
eq. 4) uses k3. To regularise with k1, put it in the reward (``advantages.kl_to_go``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from framework.algorithms.ratios import MAX_LOG_RATIO

KLEstimator = Callable[[Tensor, Tensor], Tensor]
"""``(logprobs [M], ref_logprobs [M]) -> [M]``."""


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """d, ``[M]``: unbiased and of high variance; its expected gradient as a loss is zero."""
    return logprobs - ref_logprobs


def k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """d^2 / 2, ``[M]``: biased value, unbiased gradient of KL(policy || reference)."""
    return 0.5 * (logprobs - ref_logprobs).square()


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """exp(-d) - 1 + d, ``[M]``: unbiased value, never negative (DeepSeekMath eq. 4); -d is clamped at 20."""
    negative = (ref_logprobs - logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return torch.exp(negative) - 1.0 - negative


KL_ESTIMATORS: Mapping[str, KLEstimator] = {"k1": k1, "k2": k2, "k3": k3}
