"""Rewards to advantages: one number per rollout, then one per token. Pure functions; no model, no sampling.

A batch is flat: N rollouts, ``rewards [N]`` and ``group_ids [N]``, and their M trained tokens laid end to end in the
order of the rollouts, ``num_tokens [N]`` each. Groups need not be contiguous or of equal size. With data parallelism
every function gets this replica's share; whole groups live on one replica, and what spans the batch (REINFORCE++)
goes through ``global_sum``, which every replica must then call the same number of times.

Estimators of one number per rollout: :func:`group_normalized` (GRPO), :func:`group_centered` (Dr. GRPO),
:func:`leave_one_out` (RLOO), :func:`uncentered` (REINFORCE). REINFORCE++ is :func:`batch_normalized` over the tokens of
:func:`uncentered` or, with baseline, of :func:`group_centered`. Arithmetic is float64, results are float32.

Degenerate groups (all rewards equal, a group of one included) give exactly zero everywhere, not rounding noise divided
by a tiny standard deviation; :func:`leave_one_out` refuses a group of one, which has nobody to leave in.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from framework.errors import ConfigError

RolloutEstimator = Callable[[Tensor, Tensor], Tensor]
"""``(rewards [N], group_ids [N]) -> advantages [N]``; what an estimator named in the config must be."""

GlobalSum = Callable[[float], float]
"""Adds a number over the data-parallel group; the identity on one replica."""


def _groups(rewards: Tensor, group_ids: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Float64 rewards, the dense group index ``[N]``, each group's size ``[G]`` and mean ``[G]``."""
    if rewards.shape != group_ids.shape or rewards.ndim != 1:
        raise ConfigError(
            f"rewards {tuple(rewards.shape)} and group_ids {tuple(group_ids.shape)} must be flat and of equal length"
        )
    if not torch.isfinite(rewards).all():
        raise ConfigError(f"rewards must be finite, got {rewards.tolist()}")
    values = rewards.double()
    _, index = torch.unique(group_ids, return_inverse=True)
    size = torch.bincount(index)
    mean = torch.zeros(len(size), dtype=torch.float64).index_add(0, index, values) / size
    return values, index, size, mean


def _is_constant(values: Tensor, index: Tensor, num_groups: int) -> Tensor:
    """``[G]`` True where every value of the group is the same number."""
    low = torch.full((num_groups,), torch.inf, dtype=values.dtype).scatter_reduce(0, index, values, "amin")
    high = torch.full((num_groups,), -torch.inf, dtype=values.dtype).scatter_reduce(0, index, values, "amax")
    return low == high


def uncentered(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """A_i = r_i: REINFORCE without a baseline, the first stage of REINFORCE++.

    Args:
        rewards: ``[N]`` float.
        group_ids: ``[N]`` int64, unused: every rollout stands for itself.

    Returns:
        ``[N]`` float32.
    """
    return _groups(rewards, group_ids)[0].float()


def group_centered(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """A_i = r_i - mean(r of the group): Dr. GRPO (Liu et al. 2025, arXiv 2503.20783).

    Args:
        rewards: ``[N]`` float.
        group_ids: ``[N]`` int64; equal ids share a prompt.

    Returns:
        ``[N]`` float32; zero in degenerate groups.
    """
    values, index, size, mean = _groups(rewards, group_ids)
    constant = _is_constant(values, index, len(size))
    return torch.where(constant[index], 0.0, values - mean[index]).float()


def group_normalized(rewards: Tensor, group_ids: Tensor, *, eps: float = 1e-6) -> Tensor:
    """A_i = (r_i - mean) / (std + eps) within the group: GRPO (DeepSeekMath, arXiv 2402.03300, section 4.1.2).

    The standard deviation is the sample's (divided by size - 1), as in TRL, verl and OpenRLHF; the paper does not say.

    Args:
        rewards: ``[N]`` float.
        group_ids: ``[N]`` int64; equal ids share a prompt.
        eps: added to the standard deviation (verl 1e-6, TRL 1e-4, OpenRLHF 1e-9).

    Returns:
        ``[N]`` float32; zero in degenerate groups.
    """
    values, index, size, mean = _groups(rewards, group_ids)
    centered = values - mean[index]
    squares = torch.zeros(len(size), dtype=torch.float64).index_add(0, index, centered.square())
    std = (squares / (size - 1).clamp(min=1)).sqrt()
    constant = _is_constant(values, index, len(size))
    return torch.where(constant[index], 0.0, centered / (std[index] + eps)).float()


def leave_one_out(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """A_i = r_i - mean(r of the others in the group): RLOO (Ahmadian et al. 2024, arXiv 2402.14740).

    Args:
        rewards: ``[N]`` float.
        group_ids: ``[N]`` int64; equal ids share a prompt.

    Returns:
        ``[N]`` float32; zero in degenerate groups of two or more.

    Raises:
        ConfigError: a group has a single rollout.
    """
    values, index, size, mean = _groups(rewards, group_ids)
    if bool((size < 2).any()):
        raise ConfigError("leave-one-out needs at least 2 rollouts in every group; raise the group size")
    constant = _is_constant(values, index, len(size))
    size_of = size[index].double()
    others = (size_of * mean[index] - values) / (size_of - 1)
    return torch.where(constant[index], 0.0, values - others).float()


def per_token(advantages: Tensor, num_tokens: Tensor) -> Tensor:
    """Gives every trained token its rollout's advantage.

    Args:
        advantages: ``[N]``.
        num_tokens: ``[N]`` int64 trained tokens of each rollout; 0 is allowed.

    Returns:
        ``[M]``.
    """
    return torch.repeat_interleave(advantages, num_tokens)


def kl_to_go(logprobs: Tensor, ref_logprobs: Tensor, num_tokens: Tensor) -> Tensor:
    """Sum of the k1 estimate over this token and those after it: what KL in the reward adds to an advantage, negated.

    ``sum_{i >= t} (logprobs_i - ref_logprobs_i)`` within each rollout, REINFORCE++ (arXiv 2501.03262, its token
    reward r - beta * KL with no discount). A later token's KL is the consequence of an earlier choice, never the
    reverse, hence the reward to go. Unlike a KL loss, its gradient is the reverse KL's: it reaches the policy through
    the policy gradient.

    Args:
        logprobs: ``[M]`` of the sampled tokens under the policy that sampled them.
        ref_logprobs: ``[M]`` under the base model.
        num_tokens: ``[N]`` int64, summing to M.

    Returns:
        ``[M]`` float32.
    """
    k1 = (logprobs - ref_logprobs).double()
    total_after = torch.flip(torch.cumsum(torch.flip(k1, [0]), 0), [0])
    ends = torch.cumsum(num_tokens, 0)
    after_rollout = torch.cat([total_after, total_after.new_zeros(1)])[ends]
    return (total_after - per_token(after_rollout, num_tokens)).float()


def batch_normalized(advantages: Tensor, *, global_sum: GlobalSum = lambda value: value) -> Tensor:
    """Zero mean and unit deviation over every trained token of the global batch: REINFORCE++ (arXiv 2501.03262).

    (A - mean) / max(std, 1e-4), the standard deviation being the population's (divided by the count), as in OpenRLHF,
    the authors' code. Long rollouts weigh more, for the mean is over tokens. A batch whose advantages are all equal
    gives zero (to 1e-11).

    Args:
        advantages: ``[M]`` this replica's share.
        global_sum: adds a number over the data-parallel group; called three times by every replica.

    Returns:
        ``[M]`` float32.
    """
    values = advantages.double()
    count = max(global_sum(float(len(values))), 1.0)
    mean = global_sum(float(values.sum())) / count
    variance = global_sum(float((values - mean).square().sum())) / count
    std = math.sqrt(max(variance, 1e-8))
    return ((values - mean) / std).float()
