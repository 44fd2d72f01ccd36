"""The mismatch gate: the trainer's logprobs of the sampled tokens against the engine's, every step, before the update.

Both sides hold the same weights then, so the difference is numerics or a fault: an adapter that was not delivered, a
stale one, a wrong temperature, a wrong mask.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import torch

from framework.algorithms.base import Metric
from framework.algorithms.datums import trained_values
from framework.algorithms.mismatch import measure_mismatch
from framework.config import ParityConfig
from framework.distributed import Mesh
from framework.errors import MismatchError
from framework.metrics import reduce_metrics
from framework.trainer.base import ForwardResult
from framework.types import Datum


def measure_parity(datums: Sequence[Datum], trained: ForwardResult, mesh: Mesh) -> dict[str, float]:
    """``parity/*`` over all trained tokens of all replicas. Every rank of the data-parallel group must call it.

    Args:
        datums: this replica's, with ``sampling_logprobs``.
        trained: the trainer's logprobs of the same tokens, at the same temperature.
    """
    sampled = np.concatenate([trained_values(datum, "sampling_logprobs") for datum in datums])
    mismatch = measure_mismatch(torch.from_numpy(np.concatenate(trained.logprobs)), torch.from_numpy(sampled))
    means: dict[str, Metric] = dict(mismatch.means)
    values = reduce_metrics([means], global_sum=mesh.global_sum)
    return {**values, **{name: max(mesh.all_gather(value)) for name, value in mismatch.maxima.items()}}


def check_parity(values: dict[str, float], gate: ParityConfig, *, step: int) -> None:
    """Warns, then aborts, when the difference is beyond the configured thresholds.

    Raises:
        MismatchError: beyond an ``abort`` threshold, or not a finite number.
    """
    for name, warn, abort in (
        ("logprob_abs_diff_mean", gate.warn_abs_diff_mean, gate.abort_abs_diff_mean),
        ("logprob_abs_diff_max", gate.warn_abs_diff_max, gate.abort_abs_diff_max),
        ("gen_kl_error", gate.warn_gen_kl_error, gate.abort_gen_kl_error),
        ("token_mult_prob_error", gate.warn_token_mult_prob_error, gate.abort_token_mult_prob_error),
    ):
        value = values[f"parity/{name}"]
        if not value <= abort:
            raise MismatchError(
                f"step {step}: parity/{name}={value:.4g} is beyond the limit {abort:.4g}: the engine did not "
                f"sample from the weights being trained, or not at their temperature; if this is the model's "
                f"numerics, raise the abort threshold in the section parity; numerics=exact allows no difference, "
                f"numerics=fast does"
            )
        if value > warn:
            warnings.warn(f"step {step}: parity/{name}={value:.4g} is above {warn:.4g}", RuntimeWarning, stacklevel=2)
