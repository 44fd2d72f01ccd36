"""Packed microbatch to padded rows for a transformers model, and logprobs at the scored positions of its output.

Legend: T tokens, M scored tokens, S sequences of a microbatch, L tokens of its longest sequence.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from framework.batching import Microbatch

CHUNK_BYTES = 256 * 2**20
"""Of the fp32 logits that are alive at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Padded:
    """The sequences of a microbatch one per row, from column 0. Causal attention never looks right, at the padding."""

    input_ids: Tensor
    """``[S, L]`` int64, 0 in the padding."""
    position_ids: Tensor
    """``[S, L]`` int64, 0 in the padding."""
    attention_mask: Tensor
    """``[S, L]`` int64, 1 on tokens and 0 in the padding."""
    scored: Tensor
    """``[M]`` int64 positions in the flattened ``[S * L]``."""


def pad(microbatch: Microbatch, device: torch.device) -> Padded:
    """Lays each sequence in a row of its own; a trailing padding sequence of the packing is dropped."""
    offsets = microbatch.cu_seqlens.tolist()[: microbatch.num_sequences + 1]
    lengths = [end - begin for begin, end in itertools.pairwise(offsets)]
    width = max(lengths)

    def rows(flat: Tensor) -> Tensor:
        parts = flat[: offsets[-1]].split(lengths)
        return nn.utils.rnn.pad_sequence(list(parts), batch_first=True).to(device)

    starts = torch.tensor(offsets[:-1])
    row_starts = torch.arange(len(lengths)) * width
    scored = microbatch.scored + (row_starts - starts)[microbatch.sequence_ids]
    return Padded(
        input_ids=rows(microbatch.input_ids),
        position_ids=rows(microbatch.position_ids),
        attention_mask=rows(torch.ones_like(microbatch.input_ids)),
        scored=scored.to(device),
    )


def logprobs_and_entropy(hidden: Tensor, targets: Tensor, head: nn.Module, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-softmax of ``head(hidden) / temperature`` in fp32: the target's entry, and the entropy, at every position.

    Works in chunks whose logits are made again in the backward pass, so that few are alive at once.

    Args:
        hidden: ``[M, hidden]`` model dtype.
        targets: ``[M]`` int64.
        head: the output layer.
        temperature: of the sampling distribution, > 0.

    Returns:
        Logprobs ``[M]`` and entropy in nats ``[M]``, float32, both with gradient.
    """

    def chunk(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        log_p = torch.log_softmax(head(hidden).float() / temperature, dim=-1)
        return log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(dim=1)

    vocab_size = next(head.parameters()).shape[0]
    size = max(1, CHUNK_BYTES // (4 * vocab_size))
    parts = [
        checkpoint(chunk, h, t, use_reentrant=False, preserve_rng_state=False)
        for h, t in zip(hidden.split(size), targets.split(size), strict=True)
    ]
    return torch.cat([logprobs for logprobs, _ in parts]), torch.cat([entropy for _, entropy in parts])
