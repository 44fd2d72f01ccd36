"""The engine's logprobs by the trainer's kernel, in one reading of the logits. Holds for vllm 0.26.0 on a GPU.

vLLM reads a row of logits three times for a token's logprob and rank, in another order of summation than the trainer's.
The logprobs are of the distribution that was drawn from (``logprobs_mode="processed_logprobs"``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from framework.kernels.vocabulary import token_logprobs


def install() -> None:
    """Replaces how engines of this process score the tokens they sample and the tokens of a prompt."""
    from vllm.v1.worker.gpu.sample import logprob, prompt_logprob, sampler

    for user in (sampler, prompt_logprob):
        user.compute_topk_scores = in_one_reading(logprob.compute_topk_scores)


def in_one_reading(original: Any) -> Callable[..., Any]:
    """``compute_topk_scores`` with the tokens themselves scored by the shared kernel, also among the likeliest."""
    from vllm.v1.outputs import LogprobsTensors

    def compute_topk_scores(
        logits: Tensor,
        num_logprobs: int,
        sampled_token_ids: Tensor,
        cu_num_logits: list[int] | None = None,
        *,
        max_per_req_token_ids: int = 0,
        **vllms: Any,
    ) -> Any:
        logprobs, ranks = token_logprobs(logits, sampled_token_ids)
        if not num_logprobs and not max_per_req_token_ids:
            return LogprobsTensors(
                logprob_token_ids=sampled_token_ids[:, None],
                logprobs=logprobs[:, None],
                selected_token_ranks=ranks,
                cu_num_generated_tokens=cu_num_logits,
            )
        vllms["max_per_req_token_ids"] = max_per_req_token_ids
        made = original(logits, num_logprobs, sampled_token_ids, cu_num_logits, **vllms)
        same = (made.logprob_token_ids == sampled_token_ids[:, None]) & (made.logprobs > float("-inf"))
        made.logprobs.copy_(torch.where(same, logprobs[:, None], made.logprobs))
        return made

    return compute_topk_scores
