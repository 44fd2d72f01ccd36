"""Datums to microbatches: the token shift, packing and the per-token weights happen here and nowhere else.

A microbatch is several sequences laid end to end, without padding between them. Only *scored* positions (those
whose next token is trained on or asked for) reach the output layer. The loss is ``sum(per_token * weights)`` with
weights made once from the global batch, so microbatch size, packing and the data-parallel split change nothing.

Legend: T tokens of a microbatch, M scored tokens of a microbatch, S sequences of a microbatch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from framework.algorithms.base import Aggregation
from framework.errors import ConfigError, StaleSampleError
from framework.types import AdapterRef, Datum


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One datum after the shift: position i predicts ``target_ids[i]`` from ``input_ids[: i + 1]``."""

    input_ids: npt.NDArray[np.int64]
    """``[N]``."""
    scored: npt.NDArray[np.int64]
    """``[m]`` increasing positions in [0, N) whose target is scored."""
    target_ids: npt.NDArray[np.int64]
    """``[m]`` the token to be predicted at each scored position."""
    weights: npt.NDArray[np.float32]
    """``[m]`` what each scored token's loss is multiplied by."""
    fields: Mapping[str, npt.NDArray[np.float32]] = field(default_factory=dict)
    """``[m]`` each: advantages, sampling_logprobs, ..."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Microbatch:
    """Packed tensors on the CPU; the trainer moves them. Lengths T and M are independent."""

    input_ids: Tensor
    """``[T]`` int64."""
    position_ids: Tensor
    """``[T]`` int64, from 0 in each sequence."""
    cu_seqlens: Tensor
    """``[S' + 1]`` int32 offsets of the sequences in T; S' counts a trailing padding sequence if there is one."""
    max_seqlen: int
    scored: Tensor
    """``[M]`` int64 positions in T."""
    target_ids: Tensor
    """``[M]`` int64."""
    weights: Tensor
    """``[M]`` float32."""
    sequence_ids: Tensor
    """``[M]`` int64 in [0, S)."""
    datum_ids: tuple[int, ...]
    """Of each of the S sequences, its index in the batch."""
    fields: Mapping[str, Tensor]
    """``[M]`` float32 each."""

    @property
    def num_sequences(self) -> int:
        return len(self.datum_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """This data-parallel replica's share of one batch."""

    microbatches: tuple[Microbatch, ...]
    num_datums: int
    temperature: float = 1.0
    """Logits are divided by it before the log-softmax, as the engine did when it sampled."""


def shift(datum: Datum) -> Example:
    """The one token shift of the code base: token t is predicted at position t - 1. Weights are 1.

    Raises:
        ConfigError: fewer than two tokens, a per-token value of another length, or a scored first token.
    """
    num_tokens = len(datum.token_ids)
    if num_tokens < 2:
        raise ConfigError(f"a datum needs at least 2 tokens to predict one, this one has {num_tokens}")
    for name, values in {"loss_mask": datum.loss_mask, **datum.fields}.items():
        if len(values) != num_tokens:
            raise ConfigError(f"datum.{name} has {len(values)} entries for {num_tokens} tokens; they must be equal")
    if datum.loss_mask[0]:
        raise ConfigError("datum.loss_mask[0] is True: nothing predicts the first token")
    tokens = np.asarray(datum.token_ids, dtype=np.int64)
    targets = np.flatnonzero(np.asarray(datum.loss_mask, dtype=bool))
    return Example(
        input_ids=tokens[:-1],
        scored=targets - 1,
        target_ids=tokens[targets],
        weights=np.ones(len(targets), dtype=np.float32),
        fields={name: np.asarray(values, dtype=np.float32)[targets] for name, values in datum.fields.items()},
    )


def aggregate(
    sequences: Sequence[Example],
    aggregation: Aggregation,
    *,
    constant: float = 1.0,
    global_sum: Callable[[float], float] = lambda value: value,
) -> tuple[Example, ...]:
    """Multiplies each sequence's weights so that the sum of weighted losses is the asked-for mean of the global batch.

    Args:
        sequences: this replica's share.
        aggregation: ``token_mean`` divides by the number of scored tokens (DAPO eq. 8); ``sequence_mean`` averages
            per-sequence token means (GRPO, DeepSeekMath eq. 3); ``constant`` divides the sum by sequences times
            ``constant`` (Dr. GRPO); ``sum`` leaves it.
        constant: tokens per sequence for ``constant``, e.g. the maximal completion length.
        global_sum: adds a number over the data-parallel group.
    """
    if aggregation == "sum":
        return tuple(sequences)
    with_tokens = [s for s in sequences if len(s.scored)]
    if aggregation == "token_mean":
        total = global_sum(float(sum(len(s.scored) for s in with_tokens)))
        factors = [1.0 / max(total, 1.0)] * len(sequences)
    else:
        num_sequences = max(global_sum(float(len(with_tokens))), 1.0)
        if aggregation == "sequence_mean":
            factors = [1.0 / (num_sequences * max(len(s.scored), 1)) for s in sequences]
        else:
            factors = [1.0 / (num_sequences * constant)] * len(sequences)
    return tuple(
        Example(
            input_ids=s.input_ids,
            scored=s.scored,
            target_ids=s.target_ids,
            weights=(s.weights * np.float32(factor)).astype(np.float32),
            fields=s.fields,
        )
        for s, factor in zip(sequences, factors, strict=True)
    )


def pack(
    sequences: Sequence[Example],
    *,
    max_tokens: int,
    multiple_of: int = 1,
    temperature: float = 1.0,
    keep_together: int = 1,
) -> Batch:
    """Lays sequences end to end into microbatches of at most ``max_tokens`` tokens, longest first (first fit).

    Args:
        sequences: this replica's share; every one must have the same ``fields``.
        max_tokens: token budget of one microbatch; a longer sequence is an error.
        multiple_of: pads each microbatch with one unscored sequence up to a multiple (sequence parallelism).
        temperature: see :class:`Batch`.
        keep_together: every run of this many consecutive sequences lands in one microbatch, in order and side by
            side; 2 for (chosen, rejected) pairs. ``sequence_ids`` 2j and 2j + 1 are then a pair.

    Raises:
        ConfigError: the batch is empty, a run is incomplete or longer than the budget, or fields differ.
    """
    if not sequences:
        raise ConfigError("the batch has no datums")
    if len(sequences) % keep_together:
        raise ConfigError(f"{len(sequences)} datums cannot be kept together in runs of {keep_together}")
    names = set(sequences[0].fields)
    for index, sequence in enumerate(sequences):
        if set(sequence.fields) != names:
            raise ConfigError(f"datum {index} has fields {sorted(sequence.fields)}, datum 0 has {sorted(names)}")
    runs = [range(start, start + keep_together) for start in range(0, len(sequences), keep_together)]
    sizes = [sum(len(sequences[i].input_ids) for i in run) for run in runs]
    for run, size in zip(runs, sizes, strict=True):
        if size > max_tokens:
            which = (
                f"datum {run[0]} has" if keep_together == 1 else f"datums {run[0]} to {run[-1]}, kept together, have"
            )
            raise ConfigError(
                f"{which} {size} tokens, the microbatch budget is "
                f"trainer.max_tokens_per_microbatch={max_tokens}; raise it or shorten the datum"
            )
    microbatches = tuple(
        _microbatch(sequences, [i for run in sorted(chosen) for i in runs[run]], multiple_of)
        for chosen in _first_fit(sizes, max_tokens)
    )
    return Batch(microbatches=microbatches, num_datums=len(sequences), temperature=temperature)


def _first_fit(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of ``sizes`` in bins of at most ``capacity``, largest first, each into the first bin with room."""
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        slot = next((b for b, free in enumerate(room) if free >= sizes[index]), None)
        if slot is None:
            bins.append([])
            room.append(capacity)
            slot = len(bins) - 1
        bins[slot].append(index)
        room[slot] -= sizes[index]
    return bins


def _microbatch(sequences: Sequence[Example], indices: Sequence[int], multiple_of: int) -> Microbatch:
    chosen = [sequences[i] for i in indices]
    lengths = [len(s.input_ids) for s in chosen]
    padding = -sum(lengths) % multiple_of
    if padding:
        lengths.append(padding)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    inputs = [s.input_ids for s in chosen] + ([np.zeros(padding, dtype=np.int64)] if padding else [])
    counts = [len(s.scored) for s in chosen]
    fields = {
        name: torch.from_numpy(np.concatenate([s.fields[name] for s in chosen]).astype(np.float32))
        for name in chosen[0].fields
    }
    return Microbatch(
        input_ids=torch.from_numpy(np.concatenate(inputs).astype(np.int64)),
        position_ids=torch.from_numpy(np.concatenate([np.arange(n, dtype=np.int64) for n in lengths])),
        cu_seqlens=torch.from_numpy(offsets.astype(np.int32)),
        max_seqlen=max(lengths),
        scored=torch.from_numpy(
            np.concatenate([s.scored + offset for s, offset in zip(chosen, offsets, strict=False)]).astype(np.int64)
        ),
        target_ids=torch.from_numpy(np.concatenate([s.target_ids for s in chosen]).astype(np.int64)),
        weights=torch.from_numpy(np.concatenate([s.weights for s in chosen]).astype(np.float32)),
        sequence_ids=torch.from_numpy(np.repeat(np.arange(len(chosen), dtype=np.int64), counts)),
        datum_ids=tuple(indices),
        fields=fields,
    )


def make_batch(
    datums: Sequence[Datum],
    *,
    aggregation: Aggregation,
    max_tokens: int,
    multiple_of: int = 1,
    temperature: float = 1.0,
    constant: float = 1.0,
    keep_together: int = 1,
    global_sum: Callable[[float], float] = lambda value: value,
    version: AdapterRef | None = None,
    max_lag: int = 0,
) -> Batch:
    """Shift, aggregate and pack this replica's datums.

    Args:
        datums: this replica's share; those without a trained token are left out of the microbatches' scored tokens.
        version: the adapter version being trained; every datum must have been sampled by it, content hash included.
            None does not check.
        max_lag: a datum may be of a version up to so many before it.

    See :func:`aggregate` and :func:`pack` for the rest.

    Raises:
        StaleSampleError: a datum was sampled by another adapter, or by a version that is newer or too old.
    """
    if version is not None:
        for index, datum in enumerate(datums):
            if not may_train(datum.adapter, version, max_lag):
                raise StaleSampleError(
                    f"datum {index} was sampled by {_described(datum.adapter)}, the trainer is at "
                    f"{_described(version)} and takes samples that are at most rollout.max_lag={max_lag} versions older"
                )
    examples = aggregate([shift(datum) for datum in datums], aggregation, constant=constant, global_sum=global_sum)
    return pack(
        examples, max_tokens=max_tokens, multiple_of=multiple_of, temperature=temperature, keep_together=keep_together
    )


def may_train(sampled_by: AdapterRef | None, version: AdapterRef, max_lag: int) -> bool:
    """True for a sample of this very version, content hash included, or of one at most ``max_lag`` before it."""
    if sampled_by is None or sampled_by.name != version.name:
        return False
    lag = version.version - sampled_by.version
    return sampled_by == version if lag == 0 else 0 < lag <= max_lag


def _described(ref: AdapterRef | None) -> str:
    return "the base model" if ref is None else f"{ref} ({ref.content_hash})"
