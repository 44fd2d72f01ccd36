"""An algorithm put together: what a recipe asks between sampling and ``forward_backward``. Built by ``catalog.py``.

Example (recipes/grpo.py, without the distribution over replicas)::

    datums = algorithm.datums(groups)
    if algorithm.needs_ref_logprobs:
        datums = with_field(datums, "ref_logprobs", trainer.forward(None, batch_of(datums)).logprobs)
    advantages = algorithm.advantages(groups, datums)
    datums = with_field(datums, "advantages", advantages.values)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from framework.algorithms.advantages import GlobalSum, RolloutEstimator, batch_normalized, kl_to_go, per_token
from framework.algorithms.base import Aggregation, LossFn, Metric
from framework.algorithms.datums import rollouts_of, to_datum, trained_values
from framework.algorithms.reward_shaping import is_informative, overlong_penalty, without_loss_if_truncated
from framework.types import Datum, Rollout, RolloutGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class Advantages:
    """What :meth:`Algorithm.advantages` returns."""

    values: tuple[npt.NDArray[np.float32], ...]
    """One ``[trained tokens]`` array per datum."""
    metrics: Mapping[str, Metric]


@dataclass(frozen=True, slots=True, kw_only=True)
class Algorithm:
    """Pure: no model, no rank, no logger. Methods take this replica's whole groups."""

    name: str
    estimator: RolloutEstimator
    batch_normalize: bool
    loss: LossFn
    """For ``Trainer.forward_backward``; reads the fields advantages, sampling_logprobs and, with KL, ref_logprobs."""
    aggregation: Aggregation
    """For ``batching.aggregate``, whose ``constant`` is :attr:`max_tokens`."""
    max_tokens: int
    reward_kl_coef: float
    needs_ref_logprobs: bool
    """True if the datums must have ``ref_logprobs`` before :meth:`advantages`."""
    dynamic_sampling: bool
    overlong_filter: bool
    overlong_buffer_tokens: int
    overlong_factor: float

    def datums(self, groups: Sequence[RolloutGroup]) -> tuple[Datum, ...]:
        """One datum per rollout, in order, with ``sampling_logprobs``; filtered rollouts have no trained token."""
        rollouts = rollouts_of(groups)
        if self.overlong_filter:
            rollouts = tuple(without_loss_if_truncated(rollout) for rollout in rollouts)
        return tuple(to_datum(rollout) for rollout in rollouts)

    def advantages(
        self,
        groups: Sequence[RolloutGroup],
        datums: Sequence[Datum],
        *,
        global_sum: GlobalSum = lambda value: value,
    ) -> Advantages:
        """Advantages of every trained token.

        Args:
            groups: this replica's groups, whole.
            datums: of :meth:`datums`, in the same order; with ``ref_logprobs`` if KL is in the reward. The policy's
                side of that KL is ``proximal_logprobs`` if the datums have them, else ``sampling_logprobs``.
            global_sum: adds a number over the data-parallel group; every replica must call this method together.
        """
        rollouts = rollouts_of(groups)
        rewards = torch.tensor([rollout.reward for rollout in rollouts], dtype=torch.float64)
        group_ids = torch.tensor([g for g, group in enumerate(groups) for _ in group.rollouts], dtype=torch.int64)
        penalties = self._penalties(rollouts)
        estimates = self.estimator(rewards + penalties, group_ids)
        num_tokens = torch.tensor([sum(datum.loss_mask) for datum in datums], dtype=torch.int64)
        values = per_token(estimates, num_tokens)
        if self.reward_kl_coef:
            values = values - self.reward_kl_coef * _reward_kl(datums, num_tokens)
        if self.batch_normalize:
            values = batch_normalized(values, global_sum=global_sum)
        split = torch.split(values, num_tokens.tolist())
        return Advantages(
            values=tuple(part.numpy().astype(np.float32) for part in split),
            metrics=_metrics(groups, rewards, penalties, values),
        )

    def _penalties(self, rollouts: Sequence[Rollout]) -> Tensor:
        if not self.overlong_buffer_tokens:
            return torch.zeros(len(rollouts))
        sampled = torch.tensor([sum(rollout.loss_mask) for rollout in rollouts], dtype=torch.int64)
        return overlong_penalty(
            sampled,
            max_tokens=self.max_tokens,
            buffer_tokens=self.overlong_buffer_tokens,
            factor=self.overlong_factor,
        )


def _reward_kl(datums: Sequence[Datum], num_tokens: Tensor) -> Tensor:
    """``[M]`` k1 to go of the policy that sampled against the base model."""
    side = "proximal_logprobs" if "proximal_logprobs" in datums[0].fields else "sampling_logprobs"
    policy, base = (
        torch.from_numpy(np.concatenate([trained_values(datum, name) for datum in datums]))
        for name in (side, "ref_logprobs")
    )
    return kl_to_go(policy, base, num_tokens)


def _metrics(groups: Sequence[RolloutGroup], rewards: Tensor, penalties: Tensor, values: Tensor) -> dict[str, Metric]:
    rollouts = rollouts_of(groups)
    count = float(len(rollouts))
    uninformative = float(sum(not is_informative(group) for group in groups))
    return {
        "reward/mean": Metric(sum=float(rewards.sum()), count=count),
        "reward/overlong_penalty": Metric(sum=float(penalties.sum()), count=count),
        "rollout/truncated_fraction": Metric(sum=float(sum(r.stop_reason == "length" for r in rollouts)), count=count),
        "rollout/uninformative_group_fraction": Metric(sum=uninformative, count=float(len(groups))),
        "advantage/mean": Metric(sum=float(values.sum()), count=float(len(values))),
        "advantage/abs": Metric(sum=float(values.abs().sum()), count=float(len(values))),
    }
