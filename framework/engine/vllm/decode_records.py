"""What a decode step records per request, in fewer calls. Holds for the versions of internals.py.

With a hundred small requests a step is bound by Python, and half of its calls record what is one number per request:
the sampled token's logprob goes through four functions and two iterators, and the adapters in use are gathered by
hashing every request's adapter by its name. The results here are the same, field by field.
"""

from __future__ import annotations

from typing import Any


def keep_records_short(llm_engine: Any) -> None:
    """Replaces how this engine's requests keep the sampled token's logprob, and how its runner gathers adapters."""
    from vllm.v1.engine.logprobs import LogprobsProcessor

    from framework.engine.vllm import internals

    LogprobsProcessor._update_sample_logprobs = sampled_alone(_original(LogprobsProcessor, "_update_sample_logprobs"))
    adapters = getattr(internals.model_runner(llm_engine), "lora_state", None)
    if adapters is not None:
        adapters.get_activate_loras = lambda req_ids: in_use(adapters.lora_requests, req_ids)


def _original(kind: Any, name: str) -> Any:
    """vLLM's own method, also when another engine of this process has replaced it before."""
    method = vars(kind)[name]
    return getattr(method, "replaces", method)


def sampled_alone(original: Any) -> Any:
    """``_update_sample_logprobs`` that leaves to vLLM's own whatever is not the sampled token alone, in a flat list."""
    from vllm.logprobs import FlatLogprobs

    def update(processor: Any, lists: Any) -> None:
        kept = processor.logprobs
        if processor.num_logprobs != 0 or processor.tokenizer is not None or type(kept) is not FlatLogprobs:
            original(processor, lists)
            return
        tokens, logprobs, ranks = lists[:3]  # [n, k], [n, k], [n]; the sampled token's column is the first
        for row in range(len(logprobs)):
            logprob = logprobs.item(row, 0)
            processor.cumulative_logprob += logprob
            start = len(kept.logprobs)
            kept.start_indices.append(start)
            kept.end_indices.append(start + 1)
            kept.token_ids.append(tokens.item(row, 0))
            kept.logprobs.append(logprob)
            kept.ranks.append(ranks.item(row))
            kept.decoded_tokens.append(None)

    update.replaces = original  # type: ignore[attr-defined]
    return update


def in_use(request_of: dict[str, Any], req_ids: list[str]) -> set[Any]:
    """The adapters of these requests; equal ones are one object here (``VllmEngine`` keeps one per version)."""
    found = {id(adapter): adapter for adapter in map(request_of.get, req_ids)}
    found.pop(id(None), None)
    return set(found.values())
