"""What happens to a rollout before its advantage: too long, cut off, or from a group that teaches nothing (DAPO).

Pure functions on records; sampling again in place of a discarded group belongs to ``rollout.py``. All of it is from
DAPO (Yu et al. 2025, arXiv 2503.14476).
"""

from __future__ import annotations

import dataclasses

from torch import Tensor

from framework.errors import ConfigError
from framework.types import Rollout, RolloutGroup


def overlong_penalty(num_tokens: Tensor, *, max_tokens: int, buffer_tokens: int, factor: float = 1.0) -> Tensor:
    """Soft overlong punishment, DAPO eq. 13: 0 up to ``max - buffer``, then linear down to ``-factor`` at ``max``.

    Args:
        num_tokens: ``[N]`` int64 sampled tokens of each rollout.
        max_tokens: the longest completion that can be sampled.
        buffer_tokens: length of the ramp before it (the paper: 4096 before 20480).
        factor: the penalty at and beyond ``max_tokens``.

    Returns:
        ``[N]`` float32, at most 0; add it to the rewards.

    Raises:
        ConfigError: the ramp is empty or longer than the whole.
    """
    if not 0 < buffer_tokens <= max_tokens:
        raise ConfigError(f"the overlong buffer is {buffer_tokens} tokens; it must be in (0, {max_tokens}]")
    excess = (num_tokens.double() - (max_tokens - buffer_tokens)).clamp(min=0.0, max=float(buffer_tokens))
    return (-factor * excess / buffer_tokens).float()


def without_loss_if_truncated(rollout: Rollout) -> Rollout:
    """Overlong filtering, DAPO section 3.4: a rollout cut by the token limit keeps its reward but trains no token.

    Its reward still counts in the group's mean and deviation. Without trained tokens it is in no denominator of
    ``batching.aggregate``.
    """
    if rollout.stop_reason != "length":
        return rollout
    return dataclasses.replace(rollout, loss_mask=(False,) * len(rollout.token_ids))


def is_informative(group: RolloutGroup) -> bool:
    """Dynamic sampling's condition, DAPO eq. 11: some of the group solved the problem and some did not.

    For rewards that are not 0 or 1: not all equal. Ask it of the environment's rewards, before any penalty, for two
    wrong answers of different length would otherwise look informative.
    """
    return len(set(group.rewards)) > 1
