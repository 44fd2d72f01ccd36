"""Into how many pieces a request's keys are cut. Holds for vllm 0.26.0 with FlashAttention 3.

Keys are cut so that a few long requests fill the device; a second kernel puts the pieces together, and the order of the
sums depends on their number. vLLM records its graphs for many pieces, and then the second kernel runs in every layer
also where nothing is cut. Here a decode step with enough requests to fill the device is recorded for one piece, unless
contexts can be long: among many short requests a very long one would be worked on by few multiprocessors.

With ``numerics=exact`` that holds for every step, so that a token's attention is the same sums however it is computed:
read with its prompt, after a cached prefix, or alone. One more thing is needed for that: for few queries the kernel has
another tile, which for heads of up to 64 cuts the keys into other blocks; it is told of more queries than there are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

FILLED = 0.8
"""Of the device's multiprocessors: with so many tiles of equal length FlashAttention 3 cuts nothing itself."""
LONG = 4096
"""Tokens of context up to which one request among many cannot hold a step up: 2 MB of keys and values a head."""
MANY_QUERIES = 65
"""From so many on it takes the tile that it has for prompts."""


def install(*, exact: bool) -> None:
    """Replaces how engines of this process, running ones too, describe a step to their attention kernel."""
    from vllm.utils.platform_utils import num_compute_units
    from vllm.v1.attention.backends.flash_attn import FlashAttentionMetadataBuilder as Builder

    original = vars(Builder)["build"]
    Builder.build = in_one_piece(
        getattr(original, "replaces", original), exact=exact, multiprocessors=num_compute_units()
    )


def in_one_piece(original: Any, *, exact: bool, multiprocessors: int) -> Callable[..., Any]:
    """``build`` of vLLM's builder, with one piece where that fills the device, or always."""

    def build(builder: Any, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        common = common_attn_metadata
        filled = common.num_reqs * builder.num_heads_kv >= FILLED * multiprocessors
        short = builder.model_config.max_model_len <= LONG
        if not exact and not (filled and short and common.max_query_len == 1):
            return original(builder, common_prefix_len, common, fast_build)
        if exact:
            common = replace(common, max_query_len=max(MANY_QUERIES, common.max_query_len))
        kept, builder.max_num_splits = builder.max_num_splits, 1
        try:
            made = original(builder, common_prefix_len, common, fast_build)
        finally:
            builder.max_num_splits = kept
        if exact and made.max_num_splits != 1:  # more tokens than a graph has: the schedule was made for any number
            made.max_num_splits, made.scheduler_metadata = 1, None
        return made

    build.replaces = original  # type: ignore[attr-defined]
    return build
