"""Direct preference optimisation on pairs: sequence 2j of a microbatch is chosen, sequence 2j + 1 rejected.

Lay the datums out as chosen, rejected, chosen, rejected, ...; ``batching.pack(..., keep_together=2)`` keeps each pair
in one microbatch and in that order. Aggregate with ``sequence_mean``: every token of both sequences carries its pair's
loss, so the weighted sum is the mean over pairs, whatever the lengths, packing or data-parallel split.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import logsigmoid

from framework.algorithms.base import LossInputs, LossOutput, Metric, sequence_sum
from framework.errors import ConfigError


def dpo_pair_loss(margin: Tensor, *, beta: float, label_smoothing: float) -> Tensor:
    """-(1 - e) log sigma(beta margin) - e log sigma(-beta margin).

    DPO (Rafailov et al. 2023, arXiv 2305.18290, eq. 7) at e = 0; conservative DPO (Mitchell 2023, eq. 3) above.

    Args:
        margin: ``[P]`` log(pi / ref) of the chosen completion less that of the rejected one.
        beta: strength of the implicit KL constraint.
        label_smoothing: e, the probability that a label is flipped.

    Returns:
        ``[P]``.
    """
    return -(1.0 - label_smoothing) * logsigmoid(beta * margin) - label_smoothing * logsigmoid(-beta * margin)


@dataclass(frozen=True, slots=True, kw_only=True)
class DPO:
    """The DPO loss of the pairs of a microbatch; reads ``fields["ref_logprobs"]``."""

    beta: float = 0.1
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if self.beta <= 0.0:
            raise ConfigError(f"beta={self.beta} of the DPO loss must be greater than 0")
        if not 0.0 <= self.label_smoothing < 0.5:
            raise ConfigError(f"label_smoothing={self.label_smoothing} of the DPO loss must be in [0, 0.5)")

    def __call__(self, inputs: LossInputs) -> LossOutput:
        if inputs.num_sequences % 2:
            raise ConfigError(
                f"a microbatch of {inputs.num_sequences} sequences has no pairs; lay datums out as chosen, rejected, "
                "... and pack them with keep_together=2"
            )
        log_ratios = sequence_sum(inputs.logprobs - inputs.fields["ref_logprobs"], inputs)
        margin = log_ratios[0::2] - log_ratios[1::2]
        pair_loss = dpo_pair_loss(margin, beta=self.beta, label_smoothing=self.label_smoothing)
        pairs = float(len(pair_loss))
        chosen, rejected = self.beta * log_ratios.detach()[0::2], self.beta * log_ratios.detach()[1::2]
        metrics = {
            "loss/dpo": Metric(sum=pair_loss.detach().sum(), count=pairs),
            "reward/preference_accuracy": Metric(sum=(chosen > rejected).float().sum(), count=pairs),
            "reward/chosen": Metric(sum=chosen.sum(), count=pairs),
            "reward/rejected": Metric(sum=rejected.sum(), count=pairs),
            "reward/margin": Metric(sum=(chosen - rejected).sum(), count=pairs),
        }
        return LossOutput(per_token=pair_loss[inputs.sequence_ids // 2], metrics=metrics)
