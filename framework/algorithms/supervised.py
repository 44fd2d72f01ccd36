"""Losses that need no reward: cross entropy on given tokens, and distillation on the student's own samples."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from framework.algorithms.base import LossInputs, LossOutput, token_metric
from framework.algorithms.ratios import behaviour_logprobs, token_ratio


@dataclass(frozen=True, slots=True, kw_only=True)
class CrossEntropy:
    """-lp of every scored token: supervised fine-tuning. The loss mask chose the tokens, the weights the mean."""

    def __call__(self, inputs: LossInputs) -> LossOutput:
        per_token = -inputs.logprobs
        return LossOutput(per_token=per_token, metrics={"loss/cross_entropy": token_metric(per_token)})


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightedCrossEntropy:
    """-w lp with ``fields["weights"]``, any real numbers; minus the gradient with respect to lp is w."""

    def __call__(self, inputs: LossInputs) -> LossOutput:
        return LossOutput(per_token=-inputs.fields["weights"] * inputs.logprobs)


def reverse_kl_advantages(logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
    """A_t = log pi_teacher - log pi_student of the student's own token, without gradient.

    Minus the one-sample estimate of KL(student || teacher) at that position (Agarwal et al. 2024, arXiv 2306.13649,
    reverse KL on student samples; used as an advantage by Thinking Machines, "On-policy distillation", 2025).
    Each token answers for its own KL only (discount 0).

    Args:
        logprobs: ``[M]`` of the sampled tokens under the student that sampled them.
        teacher_logprobs: ``[M]`` under the teacher (another adapter, the base model, another model).

    Returns:
        ``[M]``.
    """
    return (teacher_logprobs - logprobs).detach()


@dataclass(frozen=True, slots=True, kw_only=True)
class OnPolicyDistillation:
    """-r A with A = log teacher - log behaviour per token, from ``fields["teacher_logprobs"]``.

    On samples of the student its expected gradient is that of the per-token reverse KL.
    """

    def __call__(self, inputs: LossInputs) -> LossOutput:
        behaviour = behaviour_logprobs(inputs)
        advantages = reverse_kl_advantages(behaviour, inputs.fields["teacher_logprobs"])
        ratio = token_ratio(inputs.logprobs, behaviour)
        metrics = {"policy/reverse_kl": token_metric(-advantages), "loss/ratio": token_metric(ratio)}
        return LossOutput(per_token=-ratio * advantages, metrics=metrics)
