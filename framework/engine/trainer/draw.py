"""From logits to a token: temperature, top-k, top-p and a draw, as pure functions on one position's logits.

The order and the meaning are vLLM's: the logits are divided by the temperature, cut to the k likeliest, then to the
smallest set whose probability reaches p, and what is left is normalised. Greedy sampling has temperature 0 and
reports logprobs at temperature 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from framework.types import SamplingParams


def log_distribution(logits: Tensor, sampling: SamplingParams) -> Tensor:
    """Log-probabilities of the distribution that is drawn from.

    Args:
        logits: ``[vocab]`` float32.
        sampling: its temperature, top_k and top_p are used.

    Returns:
        ``[vocab]`` float32, -inf for tokens that cannot be drawn.
    """
    if sampling.temperature == 0.0:
        return torch.log_softmax(logits, dim=0)
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < len(logits):
        smallest = logits.topk(sampling.top_k).values[-1]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if sampling.top_p < 1.0:
        ordered, order = logits.sort(descending=True)
        before = ordered.softmax(dim=0).cumsum(dim=0) - ordered.softmax(dim=0)
        logits = logits.masked_fill(
            torch.zeros_like(logits, dtype=torch.bool).scatter(0, order, before >= sampling.top_p), -torch.inf
        )
    return torch.log_softmax(logits, dim=0)


def draw(logprobs: Tensor, sampling: SamplingParams, generator: torch.Generator) -> int:
    """A token from ``logprobs`` ``[vocab]``: the likeliest where the temperature is 0, else by the generator.

    The largest of p / e with e exponentially distributed is a sample of p (the exponential race).
    """
    if sampling.temperature == 0.0:
        return int(logprobs.argmax())
    race = torch.empty_like(logprobs).exponential_(generator=generator)
    return int((logprobs.exp() / race).argmax())


def likeliest(logprobs: Tensor, k: int) -> tuple[tuple[int, float], ...]:
    """The k likeliest tokens that can be drawn, with their logprobs, likeliest first; none for k = 0."""
    if k == 0:
        return ()
    values, tokens = logprobs.topk(min(k, len(logprobs)))
    pairs = zip(tokens.tolist(), values.tolist(), strict=True)
    return tuple((token, value) for token, value in pairs if value != -torch.inf)
