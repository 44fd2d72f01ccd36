"""A decode step asks for KV blocks only when it may need one. Holds for the versions of internals.py.

vLLM's scheduler asks for every running request in every step, which for a hundred requests takes longer than the GPU
takes for a small model's step. A token inside a block that the request already has changes nothing, so those calls are
answered here: the same blocks are allocated and cached at the same steps.
"""

from __future__ import annotations

from typing import Any

SETTLED = 3
"""Tokens into a block after which the one before is known to be cached; two steps may be in flight."""


def answer_inside_blocks(llm_engine: Any) -> None:
    """Replaces ``allocate_slots`` of this engine's cache manager, where the model has plain attention throughout."""
    from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager

    manager = llm_engine.engine_core.engine_core.scheduler.kv_cache_manager
    managers = manager.coordinator.single_type_managers
    if len(managers) == 1 and type(managers[0]) is FullAttentionManager:
        manager.allocate_slots = inside_blocks(manager)


def inside_blocks(manager: Any) -> Any:
    """``allocate_slots`` that leaves to the manager's own whatever is not a token inside a block."""
    (group,) = manager.coordinator.single_type_managers
    allocate, held, size = manager.allocate_slots, group.req_to_blocks, group.block_size
    nothing, usual = manager.empty_kv_cache_blocks, {"num_lookahead_tokens": 0}

    def allocate_slots(request: Any, num_new_tokens: int, *args: Any, **named: Any) -> Any:
        if num_new_tokens == 1 and not args and named == usual:
            computed = request.num_computed_tokens
            inside = SETTLED <= computed % size < size - 1
            if inside and computed < size * len(held.get(request.request_id, ())):
                return nothing
        return allocate(request, num_new_tokens, *args, **named)

    return allocate_slots
