"""Records that cross the seams between rooms: prompts, samples, rollouts, datums, adapter versions. No torch here.

All are frozen, slotted and keyword-only. Token ids are plain ints in tuples; a completion is never re-tokenised.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

StopReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterRef:
    """One immutable version of an adapter, as the engine serves it.

    Example: ``AdapterRef(name="policy", version=7, content_hash="9f2c...")`` prints as ``policy@7``.
    """

    name: str
    """The adapter's name, unique in the process."""
    version: int
    """From one counter per process, agreed by all ranks, never reused; it is also the engine's integer id (>= 1)."""
    content_hash: str
    """Hex digest of the bytes of this rank's shards, in module order."""

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What the model is asked to continue."""

    token_ids: tuple[int, ...]
    """The prompt's tokens, special tokens included; at least one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to sample one completion. ``temperature=0`` is greedy."""

    max_tokens: int
    """Upper bound of the completion's length in tokens, the stop token included."""
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    """-1 keeps every token."""
    seed: int | None = None
    """Seeds this request alone; two equal requests with equal seeds give equal tokens."""
    stop: tuple[str, ...] = ()
    """Strings that end the completion; the tokens that complete one are kept."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the completion and are kept as its last token."""
    ignore_eos: bool = False
    prompt_logprobs: bool = False
    """Also return the logprob of every prompt token given those before it, at temperature 1."""
    top_logprobs: int = 0
    """Also return the k likeliest alternatives of every sampled token."""
    top_prompt_logprobs: int = 0
    """Also return the k likeliest alternatives of every prompt token; implies ``prompt_logprobs``."""


TopLogprobs = tuple[tuple[tuple[int, float], ...], ...]
"""For each position, up to k pairs (token id, logprob), likeliest first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What the engine sampled for one request."""

    token_ids: tuple[int, ...]
    """The sampled tokens, the stop token included when one ended it."""
    sampling_logprobs: tuple[float, ...]
    """Engine logprob of each sampled token under the distribution it was drawn from (temperature applied)."""
    stop_reason: StopReason
    adapter: AdapterRef | None
    """The version that sampled it; None for the base model."""
    prompt_logprobs: tuple[float | None, ...] | None = None
    """One per prompt token, None at position 0; None when not asked for."""
    top_logprobs: TopLogprobs | None = None
    top_prompt_logprobs: TopLogprobs | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One finished episode: every token the model saw or produced, in order, and what it earned.

    The three per-token tuples have the same length. A token with ``loss_mask`` True was sampled by the policy.
    """

    token_ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]
    """True where the policy sampled the token."""
    sampling_logprobs: tuple[float, ...]
    """Engine logprobs; 0.0 where ``loss_mask`` is False."""
    reward: float
    adapter: AdapterRef | None
    stop_reason: StopReason
    """Of the last turn."""
    num_turns: int = 1
    metrics: Mapping[str, float] = field(default_factory=dict)
    """What the environment measured besides the reward, e.g. ``{"correct": 1.0}``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutGroup:
    """Rollouts of the same prompt; group-relative advantages compare within it."""

    rollouts: tuple[Rollout, ...]
    problem_id: str
    """Names the problem in tables and logs, e.g. ``"arithmetic/41"``."""

    @property
    def rewards(self) -> tuple[float, ...]:
        return tuple(rollout.reward for rollout in self.rollouts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Datum:
    """One sequence to train on, unshifted: entry t of every per-token tuple belongs to token t.

    ``batching.py`` turns it into (input, target) pairs; nothing else shifts. Optional per-token values are in
    ``fields``: ``advantages``, ``sampling_logprobs``, ``ref_logprobs``, ``weights``, each as long as ``token_ids``.
    """

    token_ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]
    """True where the token is trained on. Position 0 can never be (nothing predicts it)."""
    fields: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    adapter: AdapterRef | None = None
    """The version that sampled it; the trainer refuses another. None for data nobody sampled (SFT)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamParams:
    """Hyper-parameters of one AdamW step (Loshchilov & Hutter 2019, decoupled weight decay)."""

    learning_rate: float
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 0.0
    """Global L2 norm the gradient is clipped to; 0 does not clip."""
