"""The engine's logprobs by the trainer's kernel, in one reading of the logits. Holds for vllm 0.26.0 on a GPU.

vLLM reads a row of logits three times for a token's logprob and rank, in another order of summation than the trainer's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from framework.kernels.vocabulary import token_logprobs


def install() -> None:
    """Replaces how engines of this process score the tokens they sample and the tokens of a prompt."""
    from vllm.v1.worker.gpu.sample import logprob, prompt_logprob, sampler

    for user in (sampler, prompt_logprob):
        user.compute_topk_scores = in_one_reading(logprob.compute_topk_scores)


def in_one_reading(original: Any) -> Callable[..., Any]:
    """``compute_topk_scores`` with its first column, the tokens themselves, by the shared kernel."""
    from vllm.v1.outputs import LogprobsTensors

    def compute_topk_scores(
        logits: Tensor,
        num_logprobs: int,
        sampled_token_ids: Tensor,
        cu_num_logits: list[int] | None = None,
        *,
        max_per_req_token_ids: int = 0,
        logits_mode: bool = False,
        **named: Any,
    ) -> Any:
        if logits_mode:
            return original(
                logits,
                num_logprobs,
                sampled_token_ids,
                cu_num_logits,
                max_per_req_token_ids=max_per_req_token_ids,
                logits_mode=True,
                **named,
            )
        logprobs, ranks = token_logprobs(logits, sampled_token_ids)
        if not num_logprobs and not max_per_req_token_ids:
            return LogprobsTensors(
                logprob_token_ids=sampled_token_ids[:, None],
                logprobs=logprobs[:, None],
                selected_token_ranks=ranks,
                cu_num_generated_tokens=cu_num_logits,
            )
        made = original(
            logits,
            num_logprobs,
            sampled_token_ids,
            cu_num_logits,
            max_per_req_token_ids=max_per_req_token_ids,
            **named,
        )
        made.logprobs[:, 0] = logprobs
        return made

    return compute_topk_scores
