"""What a decode step records per request, in one pass. Holds for the versions of internals.py.

With a hundred small requests a step is bound by Python. A request that only goes on, which most do in most steps, has
two numbers to record, its token and the token's logprob; vLLM carries them through a message, a slice of the batch's
logprobs and eight functions. Here they are written where those would have put them. Requests that begin, end, stream,
stop at a text or were preempted are left to vLLM's own functions, which also end the step.
"""

from __future__ import annotations

import copy
from typing import Any

ELSEWHERE = (
    "connector",
    "ec_connector",
    "aux_output_connector",
    "return_sampling_mask",
    "enable_return_routed_experts",
)
"""Parts of a scheduler that want to see every token; one that has any is left as it is."""


def keep_records_short(llm_engine: Any) -> None:
    """Replaces how this engine's scheduler takes a step's tokens, and how its runner gathers the adapters in use."""
    from framework.engine.vllm import internals

    core = llm_engine.engine_core.engine_core
    scheduler, runner = core.scheduler, internals.model_runner(llm_engine)
    managers = scheduler.kv_cache_manager.coordinator.single_type_managers
    if (
        not any(getattr(scheduler, part, None) for part in ELSEWHERE)
        and not core.use_spec_decode
        and len(managers) == 1
    ):
        states = llm_engine.output_processor.request_states
        scheduler.update_from_output = recorded_in_place(scheduler, states, asynchronous=core.async_scheduling)
    adapters = getattr(runner, "lora_state", None)
    if adapters is not None:
        adapters.get_activate_loras = lambda req_ids: in_use(adapters.lora_requests, req_ids)


def recorded_in_place(scheduler: Any, states: dict[str, Any], *, asynchronous: bool) -> Any:
    """``update_from_output`` that records the requests which go on itself and leaves the others to the scheduler's own.

    Args:
        states: the front end's requests, by id.
        asynchronous: whether steps are scheduled before the tokens of the last one are there.
    """
    original, requests, manager = scheduler.update_from_output, scheduler.requests, scheduler.kv_cache_manager
    block, hashed = scheduler.block_size, scheduler.hash_block_size

    def update_from_output(scheduled: Any, output: Any) -> Any:
        columns = output.logprobs
        if (
            not output.sampled_token_ids
            or columns is None
            or columns.cu_num_generated_tokens is not None
            or output.num_nans_in_logits
        ):
            return original(scheduled, output)
        logprobs, ranks = columns.logprobs[:, 0].tolist(), columns.sampled_token_ranks.tolist()
        row_of, tokens_of, others = output.req_id_to_index, output.sampled_token_ids, {}
        for req_id, num_tokens in scheduled.num_scheduled_tokens.items():
            request, state, row = requests.get(req_id), states.get(req_id), row_of.get(req_id)
            tokens: list[int] = [] if row is None else tokens_of[row]
            if num_tokens != 1 or len(tokens) != 1 or request is None or state is None or state.is_prefilling:
                others[req_id] = num_tokens
                continue
            ends = vars(request).get("ends")
            if ends is None:
                # Kept on vLLM's request itself, so that it goes with it.
                ends = request.ends = Ends(request, state, scheduler.max_model_len)
            (token,), known = tokens, request._all_token_ids
            if len(known) + 1 >= ends.at_tokens or token in ends.at or request.num_preemptions:
                others[req_id] = num_tokens
                continue
            known.append(token)
            request._output_token_ids.append(token)
            if len(known) % hashed == 0:
                request.update_block_hashes()
            request.num_in_flight_tokens -= 1
            if asynchronous:
                request.num_output_placeholders -= 1
                computed = request.num_computed_tokens - request.num_output_placeholders
                if computed % block == 0:
                    manager.cache_blocks(request, computed)
            state.detokenizer.token_ids.append(token)
            kept, logprob = ends.logprobs, logprobs[row]
            ends.processor.cumulative_logprob += logprob
            kept.start_indices.append(len(kept.logprobs))
            kept.end_indices.append(len(kept.logprobs) + 1)
            kept.token_ids.append(token)
            kept.logprobs.append(logprob)
            kept.ranks.append(ranks[row])
            kept.decoded_tokens.append(None)
        rest = copy.copy(scheduled)
        rest.num_scheduled_tokens = others
        return original(rest, output)

    return update_from_output


class Ends:
    """Where one request ends, and where its logprobs are kept. One that must not be recorded here ends at once."""

    __slots__ = ("at", "at_tokens", "logprobs", "processor")

    def __init__(self, request: Any, state: Any, max_model_len: int) -> None:
        self.processor = state.logprobs_processor
        self.logprobs = self.processor.logprobs
        wanted = request.sampling_params
        self.at = {wanted.eos_token_id, *(wanted.stop_token_ids or ())}
        ends = min(max_model_len, request.num_prompt_tokens + request.max_tokens)
        self.at_tokens = ends if _is_plain(request, state) else 0


def _is_plain(request: Any, state: Any) -> bool:
    from vllm.logprobs import FlatLogprobs
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.detokenizer import IncrementalDetokenizer

    wanted, processor = request.sampling_params, state.logprobs_processor
    return (
        type(state.detokenizer) is IncrementalDetokenizer
        and type(processor.logprobs) is FlatLogprobs
        and processor.num_logprobs == 0
        and processor.tokenizer is None
        and state.output_kind is RequestOutputKind.FINAL_ONLY
        and state.queue is None
        and not state.streaming_input
        and request.structured_output_request is None
        and not request.has_encoder_inputs
        and wanted.min_tokens == 0
        and wanted.repetition_detection is None
    )


def in_use(request_of: dict[str, Any], req_ids: list[str]) -> set[Any]:
    """The adapters of these requests; equal ones are one object here (``VllmEngine`` keeps one per version)."""
    found = {id(adapter): adapter for adapter in map(request_of.get, req_ids)}
    found.pop(id(None), None)
    return set(found.values())
