"""A step in which every request only goes on is scheduled in one pass. Holds for the versions of internals.py.

vLLM's scheduler asks some twenty questions about each request in each step and walks over the batch four times. Where
nobody waits and every running request wants one more token, the answers are known: what such a step is about is written
in one walk, and the scheduler's own function makes the rest of it, with no request to ask about.
"""

from __future__ import annotations

from typing import Any

ELSEWHERE = ("connector", "ec_connector", "aux_output_connector", "defer_block_free", "needs_kv_cache_zeroing")
"""Parts of a scheduler that take part in every step; one that has any is left as it is."""
WAITING = ("waiting", "skipped_waiting", "kv_holding_waiting")
"""Where requests wait, in one version or another."""


def schedule_in_one_pass(llm_engine: Any) -> None:
    """Replaces ``schedule`` of an engine that schedules before the last step's tokens are there (vLLM's own choice)."""
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler

    scheduler = llm_engine.engine_core.engine_core.scheduler
    if type(scheduler) is AsyncScheduler:
        one_pass(scheduler)


def one_pass(scheduler: Any) -> None:
    """Replaces ``schedule`` of this scheduler, where it is one whose steps are known beforehand."""
    if (
        any(getattr(scheduler, part, None) for part in ELSEWHERE)
        or not scheduler.use_v2_model_runner
        or scheduler.num_spec_tokens
        or scheduler.pp_size != 1
        or len(scheduler.kv_cache_manager.coordinator.single_type_managers) != 1
    ):
        return
    original, manager = scheduler.schedule, scheduler.kv_cache_manager
    queues = [getattr(scheduler, name) for name in WAITING if hasattr(scheduler, name)]
    running_state = scheduler._pause_state

    def schedule(throttle_prefills: bool = False) -> Any:
        going_on: list[Any] = []
        if throttle_prefills or any(queues) or scheduler._pause_state is not running_state:
            return original(throttle_prefills)
        for request in scheduler.running:
            computed, ahead = request.num_computed_tokens, request.num_output_placeholders
            if ahead and computed + 2 - ahead >= request.num_prompt_tokens + request.max_tokens:
                continue  # a step in flight is its last
            if (
                len(request._all_token_ids) + ahead - computed != 1
                or computed + 2 > scheduler.max_model_len
                or request.is_prefill_chunk
                or request.spec_token_ids
                or request.structured_output_request is not None
                or request.has_encoder_inputs
            ):
                return original(throttle_prefills)
            going_on.append(request)
        room = min(scheduler.max_num_scheduled_tokens, manager.block_pool.get_num_free_blocks())
        if not going_on or len(going_on) > room:
            return original(throttle_prefills)
        return _with_one_token_each(scheduler, original, going_on)

    scheduler.schedule = schedule


def _with_one_token_each(scheduler: Any, original: Any, going_on: list[Any]) -> Any:
    running, scheduler.running = scheduler.running, []
    try:
        step = original()
    finally:
        scheduler.running = running
    allocate, eligible = scheduler.kv_cache_manager.allocate_slots, scheduler.current_step + 1
    cached, counts = step.scheduled_cached_reqs, step.num_scheduled_tokens
    for request in going_on:
        blocks = allocate(request, 1, num_lookahead_tokens=0)
        assert blocks is not None, "the KV cache had no block left after it said so"
        counts[request.request_id] = 1
        cached.req_ids.append(request.request_id)
        cached.new_block_ids.append(blocks.get_block_ids(allow_none=True))
        cached.num_computed_tokens.append(request.num_computed_tokens)
        cached.num_output_tokens.append(len(request._output_token_ids) + request.num_output_placeholders)
        request.num_computed_tokens += 1
        request.num_in_flight_tokens += 1
        request.num_output_placeholders += 1
        request.next_decode_eligible_step = eligible
    step.total_num_scheduled_tokens = len(going_on)
    return step
