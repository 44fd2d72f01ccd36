"""Rollouts to datums, and per-token results back onto datums. Values per trained token are spread by the loss mask."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from framework.errors import ConfigError
from framework.types import Datum, Rollout, RolloutGroup


def rollouts_of(groups: Iterable[RolloutGroup]) -> tuple[Rollout, ...]:
    """Every rollout, group by group: the order of the batch's datums."""
    return tuple(rollout for group in groups for rollout in group.rollouts)


def to_datum(rollout: Rollout) -> Datum:
    """The rollout's tokens, mask, version and ``sampling_logprobs``."""
    return Datum(
        token_ids=rollout.token_ids,
        loss_mask=rollout.loss_mask,
        fields={"sampling_logprobs": rollout.sampling_logprobs},
        adapter=rollout.adapter,
    )


def with_field(datums: Sequence[Datum], name: str, values: Sequence[npt.ArrayLike]) -> tuple[Datum, ...]:
    """Adds a per-token field; tokens that are not trained get 0.

    Args:
        datums: N datums.
        name: e.g. ``advantages``, ``ref_logprobs``.
        values: N arrays, one number per trained token each, as ``Trainer.forward`` returns them.

    Raises:
        ConfigError: a datum has another number of trained tokens than values.
    """
    return tuple(_spread(datum, name, np.asarray(value)) for datum, value in zip(datums, values, strict=True))


def trained_values(datum: Datum, name: str) -> npt.NDArray[np.float64]:
    """The inverse of :func:`with_field`: ``[trained tokens]`` of one datum's field."""
    values: npt.NDArray[np.float64] = np.asarray(datum.fields[name], dtype=np.float64)
    trained: npt.NDArray[np.float64] = values[np.asarray(datum.loss_mask, dtype=bool)]
    return trained


def _spread(datum: Datum, name: str, values: npt.NDArray[np.float64]) -> Datum:
    mask = np.asarray(datum.loss_mask, dtype=bool)
    if values.shape != (int(mask.sum()),):
        raise ConfigError(f"{name} has shape {values.shape} for a datum of {int(mask.sum())} trained tokens")
    full = np.zeros(len(mask), dtype=np.float64)
    full[mask] = values
    return Datum(
        token_ids=datum.token_ids,
        loss_mask=datum.loss_mask,
        fields={**datum.fields, name: tuple(full.tolist())},
        adapter=datum.adapter,
    )
