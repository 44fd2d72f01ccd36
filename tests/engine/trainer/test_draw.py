"""Temperature, top-k, top-p and the draw, by hand-made probabilities."""

from __future__ import annotations

import math

import pytest
import torch

from framework.engine.trainer.draw import draw, likeliest, log_distribution
from framework.types import SamplingParams

LOGITS = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.1, 0.4, 0.2, 0.3]),
        ({"temperature": 0.5}, [0.01 / 0.3, 0.16 / 0.3, 0.04 / 0.3, 0.09 / 0.3]),
        ({"temperature": 0.0}, [0.1, 0.4, 0.2, 0.3]),
        ({"top_k": 2}, [0.0, 4 / 7, 0.0, 3 / 7]),
        ({"top_k": 9}, [0.1, 0.4, 0.2, 0.3]),
        ({"top_p": 0.65}, [0.0, 4 / 7, 0.0, 3 / 7]),
        ({"top_p": 0.75}, [0.0, 4 / 9, 2 / 9, 3 / 9]),
        ({"top_p": 0.01}, [0.0, 1.0, 0.0, 0.0]),
        ({"top_k": 3, "top_p": 0.5}, [0.0, 4 / 7, 0.0, 3 / 7]),
    ],
)
def test_the_distribution_is_cut_and_normalised(options: dict[str, float], expected: list[float]) -> None:
    probabilities = log_distribution(LOGITS, SamplingParams(max_tokens=1, **options)).exp()  # type: ignore[arg-type]
    torch.testing.assert_close(probabilities, torch.tensor(expected), atol=1e-6, rtol=0.0)


def test_draws_have_the_frequencies_of_the_distribution() -> None:
    sampling = SamplingParams(max_tokens=1, top_k=3)
    logprobs = log_distribution(LOGITS, sampling)
    generator = torch.Generator().manual_seed(1)
    counts = torch.zeros(4)
    for _ in range(4000):
        counts[draw(logprobs, sampling, generator)] += 1
    assert counts[0] == 0
    for token, probability in ((1, 4 / 9), (2, 2 / 9), (3, 3 / 9)):
        deviation = math.sqrt(probability * (1 - probability) / 4000)
        assert abs(counts[token].item() / 4000 - probability) < 4 * deviation


def test_greedy_takes_the_likeliest_and_the_list_of_the_likeliest_leaves_out_what_cannot_be_drawn() -> None:
    greedy = SamplingParams(max_tokens=1, temperature=0.0)
    assert draw(log_distribution(LOGITS, greedy), greedy, torch.Generator()) == 1
    cut = log_distribution(LOGITS, SamplingParams(max_tokens=1, top_k=2))
    assert [token for token, _ in likeliest(cut, 3)] == [1, 3]
    assert likeliest(cut, 1)[0][1] == pytest.approx(math.log(4 / 7))
    assert likeliest(cut, 0) == ()
