"""How far the trainer's logprobs of the sampled tokens are from the engine's, measured at every step.

At the first optimizer step on a batch both sides hold the same weights, so whatever these numbers show is numerics, a
wrong temperature, a wrong mask, or an adapter that was not delivered. The formulas are those NVIDIA NeMo-RL publishes
(``docs/guides/grpo.md``, metrics; ``nemo_rl/algorithms/loss``), so gates can be compared: with
d_t = logprobs_t - sampling_logprobs_t over all trained tokens,

    token_mult_prob_error = mean(exp(|d_t|))              1 when equal; the factor by which probabilities are off
    gen_kl_error          = mean(exp(d_t) - 1 - d_t)      k3 estimate of KL(engine || trainer), 0 when equal
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from framework.algorithms.base import Metric


@dataclass(frozen=True, slots=True, kw_only=True)
class Mismatch:
    """Sums and maxima, so that parts of a batch can be merged before dividing."""

    means: Mapping[str, Metric]
    """``parity/logprob_abs_diff_mean``, ``parity/gen_kl_error``, ``parity/token_mult_prob_error``."""
    maxima: Mapping[str, float]
    """``parity/logprob_abs_diff_max``: over ranks take the maximum, not the mean."""


def measure_mismatch(logprobs: Tensor, sampling_logprobs: Tensor) -> Mismatch:
    """Compares two sets of logprobs of the same tokens; sums are float64 on the CPU.

    Args:
        logprobs: ``[M]`` of the trainer, at the sampling temperature.
        sampling_logprobs: ``[M]`` of the engine.
    """
    diff = logprobs.detach().double().cpu() - sampling_logprobs.detach().double().cpu()
    count = float(len(diff))
    return Mismatch(
        means={
            "parity/logprob_abs_diff_mean": Metric(sum=float(diff.abs().sum()), count=count),
            "parity/gen_kl_error": Metric(sum=float((torch.expm1(diff) - diff).sum()), count=count),
            "parity/token_mult_prob_error": Metric(sum=float(torch.exp(diff.abs()).sum()), count=count),
        },
        maxima={"parity/logprob_abs_diff_max": float(diff.abs().max()) if len(diff) else 0.0},
    )
