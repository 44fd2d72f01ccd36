"""The first column, and the token wherever else it stands, are the shared kernel's. Holds for vllm 0.26.0 on a GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.gpu


def vllms(logits: Tensor, num_logprobs: int, sampled_token_ids: Tensor, cu_num_logits: Any = None, **named: Any) -> Any:
    """``compute_topk_scores`` as vLLM lays its result out, every score one lower than it should be."""
    assert named.pop("max_per_req_token_ids") == 0
    assert named == {"logits_mode": False}
    ids = torch.cat([sampled_token_ids[:, None], logits.topk(num_logprobs).indices], dim=1)
    scores = logits.log_softmax(1).gather(1, ids) - 1.0
    ranks = torch.zeros_like(sampled_token_ids)
    return SimpleNamespace(logprob_token_ids=ids, logprobs=scores, selected_token_ranks=ranks)


@pytest.fixture
def logits() -> Tensor:
    return 3 * torch.randn(6, 320, device=torch.accelerator.current_accelerator())


def test_without_others_only_the_tokens_are_scored(logits: Tensor) -> None:
    from framework.engine.vllm.token_logprobs import in_one_reading
    from framework.kernels.vocabulary import token_logprobs

    tokens = logits.topk(3).indices[:, 2]
    made = in_one_reading(vllms)(logits, 0, tokens, None, logits_mode=False)
    logprobs, _ = token_logprobs(logits, tokens)
    assert torch.equal(made.logprobs, logprobs[:, None])
    assert torch.equal(made.logprob_token_ids, tokens[:, None])
    assert made.selected_token_ranks.tolist() == [3] * 6


def test_among_the_likeliest_a_token_has_the_same_score_as_in_front(logits: Tensor) -> None:
    from framework.engine.vllm.token_logprobs import in_one_reading
    from framework.kernels.vocabulary import token_logprobs

    tokens = logits.topk(3).indices[:, 2].clone()
    tokens[0] = logits[0].argmin()
    made = in_one_reading(vllms)(logits, 4, tokens, None, logits_mode=False)
    logprobs, _ = token_logprobs(logits, tokens)
    assert torch.equal(made.logprobs[:, 0], logprobs)
    assert torch.equal(made.logprobs[1:, 3], logprobs[1:]), "the third likeliest"
    theirs = vllms(logits, 4, tokens, max_per_req_token_ids=0, logits_mode=False).logprobs
    assert torch.equal(made.logprobs[:, 1:3], theirs[:, 1:3])
    assert torch.equal(made.logprobs[0, 1:], theirs[0, 1:])
