"""The engine's logprob and rank of a token, and the trainer's of the same logits, are one kernel's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.gpu


def logits_of(n: int, rows: int, stride: int) -> Tensor:
    whole = torch.randn(n, stride, device=torch.accelerator.current_accelerator(), dtype=torch.float32)
    return (3 * whole)[:, :rows]


@pytest.mark.parametrize(("rows", "stride"), [(300, 300), (8192, 8192), (49152, 49152), (50003, 50048)])
def test_the_logprob_and_rank_are_those_of_float64(rows: int, stride: int) -> None:
    from framework.kernels.vocabulary import token_logprobs

    logits = logits_of(70, rows, stride)
    tokens = torch.randint(0, rows, (70,), device=logits.device)
    logprobs, ranks = token_logprobs(logits, tokens)
    chosen = logits.gather(1, tokens[:, None])
    torch.testing.assert_close(
        logprobs.double(), logits.double().log_softmax(1).gather(1, tokens[:, None])[:, 0], rtol=2e-6, atol=2e-6
    )
    assert torch.equal(ranks, (logits >= chosen).sum(1))


@pytest.mark.parametrize(("rows", "stride"), [(320, 320), (49152, 49152), (50003, 50048)])
@pytest.mark.parametrize("n", [150, 512])
def test_a_row_has_the_same_bits_in_the_trainers_batch_and_in_the_engines(n: int, rows: int, stride: int) -> None:
    from framework.kernels.vocabulary import row_statistics, token_logprobs

    logits = logits_of(n, rows, stride)
    tokens = torch.randint(0, rows, (n,), device=logits.device)
    row = row_statistics(logits.contiguous(), tokens, 1.0)
    want = row.picked - (row.top + row.total.log())
    for part in (slice(0, n), slice(7, 8), slice(3, 12)):
        assert torch.equal(token_logprobs(logits[part], tokens[part])[0], want[part])


def test_a_temperature_is_divided_by_as_the_engine_does() -> None:
    """vLLM's sampler divides the logits in place, in a kernel of its own."""
    from vllm.v1.worker.gpu.sample.gumbel import apply_temperature

    from framework.kernels.vocabulary import row_statistics, token_logprobs

    logits = logits_of(150, 50003, 50003).contiguous()
    tokens = torch.randint(0, 50003, (150,), device=logits.device)
    row = row_statistics(logits, tokens, 0.7)
    rows = torch.arange(150, dtype=torch.int32, device=logits.device)
    apply_temperature(logits, rows, torch.full((150,), 0.7, device=logits.device))
    assert torch.equal(token_logprobs(logits, tokens)[0], row.picked - (row.top + row.total.log()))


@pytest.mark.parametrize("rows", [320, 49152, 50003])
def test_what_top_k_or_top_p_took_out_has_no_part_in_it(rows: int) -> None:
    from framework.kernels.vocabulary import row_statistics, token_logprobs

    logits = logits_of(70, rows, rows).contiguous()
    logits[logits < logits.topk(50).values[:, -1:]] = float("-inf")
    tokens = logits.softmax(1).multinomial(1)[:, 0]
    logprobs, ranks = token_logprobs(logits, tokens)
    chosen = tokens[:, None]
    want = logits.double().log_softmax(1).gather(1, chosen)[:, 0]
    torch.testing.assert_close(logprobs.double(), want, rtol=2e-6, atol=2e-6)
    assert torch.equal(ranks, (logits >= logits.gather(1, chosen)).sum(1))
    assert row_statistics(logits, tokens, 1.0).weighted.isfinite().all()


def test_a_logit_that_is_no_number_stays_loud() -> None:
    from framework.kernels.vocabulary import token_logprobs

    logits = logits_of(3, 320, 320).contiguous()
    logits[1, 7] = float("nan")
    logprobs, _ = token_logprobs(logits, torch.zeros(3, dtype=torch.int64, device=logits.device))
    assert logprobs.isnan().tolist() == [False, True, False]
