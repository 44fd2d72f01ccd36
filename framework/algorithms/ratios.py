"""The importance ratio between the trainer's policy and the one a token is attributed to, per token and per sequence.

Three sets of logprobs of the same tokens: ``logprobs`` (trainer, now, with gradient), ``proximal_logprobs`` (trainer,
when the batch's first optimizer step began) and ``sampling_logprobs`` (engine). A clipped loss limits how far the
policy moves from the *proximal* one; a correction (``corrections.py``) accounts for proximal against *sampling*.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from framework.algorithms.base import LossInputs, sequence_mean

MAX_LOG_RATIO = 20.0
"""Log ratios are clamped to plus or minus this before ``exp``: e^20 = 4.9e8, far outside any clip range, but an
infinite ratio would turn a clipped, hence zero, gradient into nan. verl and OpenRLHF clamp at the same value."""


def behaviour_logprobs(inputs: LossInputs) -> Tensor:
    """The denominator of the loss's ratio: ``proximal_logprobs`` if the batch has them, else ``sampling_logprobs``.

    Returns:
        ``[M]`` float32 without gradient.

    Raises:
        KeyError: the batch has neither.
    """
    field = "proximal_logprobs" if "proximal_logprobs" in inputs.fields else "sampling_logprobs"
    return inputs.fields[field].detach()


def with_proximal(inputs: LossInputs) -> LossInputs:
    """The same inputs, certain to have ``proximal_logprobs``.

    A batch without the field makes one optimizer step, during which the trainer's logprobs now are its logprobs when
    the step began, so their detached copy is exact. Recipes that make several steps on a batch record the field.
    """
    if "proximal_logprobs" in inputs.fields:
        return inputs
    return dataclasses.replace(inputs, fields={**inputs.fields, "proximal_logprobs": inputs.logprobs.detach()})


def token_ratio(logprobs: Tensor, behaviour: Tensor) -> Tensor:
    """r_t = exp(logprobs - behaviour), ``[M]``, with the gradient of ``logprobs``."""
    return torch.exp((logprobs - behaviour).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO))


def sequence_ratio(logprobs: Tensor, behaviour: Tensor, inputs: LossInputs) -> Tensor:
    """s_i = exp(mean over the sequence of (logprobs - behaviour)), GSPO eq. 7, given to each of its tokens.

    Returns:
        ``[M]``; the gradient of each entry reaches every token of its sequence.
    """
    mean = sequence_mean(logprobs - behaviour, inputs)
    return torch.exp(mean.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO))[inputs.sequence_ids]
