"""Evaluation: pass@k and intervals against known numbers, tables, and what is asked of the engine."""

from __future__ import annotations

import json
import math
from itertools import combinations

import pytest

from framework.data.chat import Chat
from framework.engine.base import SampleRequest
from framework.environments.arithmetic import ArithmeticProblems
from framework.errors import ConfigError
from framework.evaluation import (
    evaluate,
    greedy_accuracy,
    mean_interval,
    pass_at_k,
    results_table,
    summarise,
    to_json,
    wilson_interval,
)
from framework.types import AdapterRef, Rollout, RolloutGroup, SamplingParams
from tests.fakes import OneRank, ScriptedEngine, tiny_tokenizer

REF = AdapterRef(name="policy", version=7, content_hash="aa")


@pytest.mark.parametrize(("n", "c", "k"), [(5, 2, 1), (5, 2, 3), (6, 1, 2), (4, 0, 2), (4, 4, 1), (5, 3, 3), (5, 4, 2)])
def test_pass_at_k_is_the_fraction_of_subsets_with_a_right_sample(n: int, c: int, k: int) -> None:
    subsets = list(combinations(range(n), k))
    with_right = sum(any(sample < c for sample in subset) for subset in subsets)
    assert pass_at_k(n, c, k) == pytest.approx(with_right / len(subsets), abs=1e-12)


def test_pass_at_k_by_hand() -> None:
    # n = 200, c = 10, k = 100: 1 - C(190, 100) / C(200, 100), as the product of (1 - 100 / i) for i = 191..200.
    assert pass_at_k(200, 10, 100) == pytest.approx(1 - math.prod(1 - 100 / i for i in range(191, 201)), rel=1e-12)
    assert pass_at_k(2, 1, 1) == 0.5


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        (8, 10, 0.4901624, 0.9433178),
        (0, 10, 0.0, 0.2775328),
        (128, 128, 0.9708632, 1.0),
        (50, 100, 0.4038315, 0.5961685),
    ],
)
def test_wilson_interval_is_where_the_score_test_turns(successes: int, trials: int, low: float, high: float) -> None:
    bounds = wilson_interval(successes, trials)
    assert bounds == pytest.approx((low, high), abs=1e-6)
    for p in bounds:  # |observed - p| is 1.96 standard errors of p
        assert abs(successes / trials - p) == pytest.approx(1.959964 * math.sqrt(p * (1 - p) / trials), abs=1e-6)


def test_mean_interval_by_hand() -> None:
    # mean 0.5, variance 0.125 / 3, standard error sqrt(0.125 / 3 / 4)
    half = 1.959964 * math.sqrt(0.125 / 3 / 4)
    assert mean_interval([0.25, 0.5, 0.5, 0.75]) == pytest.approx((0.5 - half, 0.5 + half), abs=1e-6)
    assert mean_interval([0.0, 0.0, 1.0, 1.0])[0] >= 0.0
    assert mean_interval([0.5]) == (0.0, 1.0)
    assert mean_interval([0.0] * 16) == pytest.approx((0.0, 0.193608), abs=1e-6)  # Wilson's z^2 / (16 + z^2)
    assert mean_interval([1.0] * 16) == pytest.approx((1.0 - 0.193608, 1.0), abs=1e-6)


def group(*rewards: float) -> RolloutGroup:
    rollouts = tuple(
        Rollout(
            token_ids=(1, 2, 3),
            loss_mask=(False, True, True),
            sampling_logprobs=(0.0, -1.0, -1.0),
            reward=reward,
            adapter=None,
            stop_reason="length" if reward == 0.5 else "stop",
        )
        for reward in rewards
    )
    return RolloutGroup(rollouts=rollouts, problem_id="p")


def test_summary_of_several_samples() -> None:
    result = summarise([group(1, 1, 0, 0.5), group(0, 0, 0, 0)], environment="toy", model="base")
    assert (result.num_problems, result.num_samples) == (2, 4)
    assert result.accuracy == 0.25
    assert result.pass_at_k == pytest.approx({1: 0.25, 2: (5 / 6) / 2, 4: 0.5})
    assert (result.reward_mean, result.completion_tokens_mean, result.truncated_fraction) == (2.5 / 8, 2.0, 0.125)


def test_table_and_json() -> None:
    results = [
        summarise([group(1), group(0), group(1), group(1)], environment="toy", model="base"),
        summarise([group(1), group(1), group(1), group(1)], environment="toy", model="policy@7"),
    ]
    assert results_table(results).splitlines() == [
        "| environment | model | problems | accuracy | 95% interval | reward | tokens | cut |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        "| toy | base | 4 | 75.0 | 30.1 to 95.4 | 0.750 | 2.0 | 0.0% |",
        "| toy | policy@7 | 4 | 100.0 | 51.0 to 100.0 | 1.000 | 2.0 | 0.0% |",
    ]
    plain = json.loads(json.dumps(to_json(results)))
    assert plain[0]["pass_at_k"] == {"1": 0.75}
    assert plain[1]["model"] == "policy@7"


def test_evaluation_plays_every_problem_and_names_the_version() -> None:
    chat = Chat(tiny_tokenizer())
    problems = ArithmeticProblems(chat, split="heldout", size=10, seed=0)
    right = {problems.make(i).observe().token_ids: problems.row(i)["answer"] for i in range(10)}
    wrong = problems.make(3).observe().token_ids

    def answer(request: SampleRequest) -> tuple[int, ...]:
        prompt = request.prompt.token_ids
        return chat.tokens("0" if prompt == wrong else right[prompt])

    engine = ScriptedEngine(answer)
    assert greedy_accuracy(engine, REF, problems, range(10), max_tokens=8, coordinator=OneRank()) == 0.9
    assert {(r.sampling.temperature, r.sampling.max_tokens, r.adapter) for r in engine.submitted} == {(0.0, 8, REF)}
    result = evaluate(
        ScriptedEngine(answer),
        REF,
        problems,
        range(4),
        environment="arithmetic",
        num_samples=2,
        sampling=SamplingParams(max_tokens=8, temperature=1.0),
        seed=0,
        coordinator=OneRank(),
    )
    assert (result.model, result.environment, result.accuracy, result.pass_at_k) == (
        "policy@7",
        "arithmetic",
        0.75,
        {1: 0.75, 2: 0.75},
    )


def test_several_greedy_samples_are_refused() -> None:
    problems = ArithmeticProblems(Chat(tiny_tokenizer()), split="heldout", size=10, seed=0)
    with pytest.raises(ConfigError, match="4 samples at temperature 0 are equal"):
        evaluate(
            ScriptedEngine(lambda request: (5,)),
            None,
            problems,
            [0],
            environment="x",
            num_samples=4,
            sampling=SamplingParams(max_tokens=8, temperature=0.0),
            seed=0,
            coordinator=OneRank(),
        )
