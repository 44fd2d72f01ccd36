"""The arithmetic task: right answers, short prompts, splits that never meet."""

from __future__ import annotations

import re

import pytest

from framework.data.chat import Chat
from framework.environments.arithmetic import HELDOUT_PERCENT, ArithmeticProblems
from framework.errors import ConfigError
from framework.types import Completion
from tests.fakes import tiny_tokenizer


@pytest.fixture
def chat() -> Chat:
    return Chat(tiny_tokenizer())


def numbers(problems: ArithmeticProblems) -> list[frozenset[str]]:
    return [frozenset(re.findall(r"\d+", problems.row(index)["question"])) for index in range(len(problems))]


def test_the_answer_is_the_largest_number(chat: Chat) -> None:
    problems = ArithmeticProblems(chat, split="train", size=50, seed=0)
    for index, members in enumerate(numbers(problems)):
        assert len(members) == 3
        assert problems.row(index)["answer"] == str(max(map(int, members)))


def test_exactly_the_answer_earns_the_reward(chat: Chat) -> None:
    problems = ArithmeticProblems(chat, split="train", size=5, seed=0)
    right = problems.row(3)["answer"]
    for said, reward in ((right, 1.0), (f" {right}\n", 1.0), (f"{right}.", 0.0), ("It is " + right, 0.0), ("", 0.0)):
        token_ids = chat.tokens(said + chat.eos_token)
        completion = Completion(
            token_ids=token_ids, sampling_logprobs=(0.0,) * len(token_ids), stop_reason="stop", adapter=None
        )
        result = problems.make(3).step(completion)
        assert (result.reward, result.done) == (reward, True), said


def test_the_prompt_shows_one_example_and_asks(chat: Chat) -> None:
    problems = ArithmeticProblems(chat, split="train", size=5, seed=0)
    text = chat.decode(problems.make(2).observe().token_ids)
    assert text.endswith(f"<|im_start|>user\n{problems.row(2)['question']}<|im_end|>\n<|im_start|>assistant\n")
    assert text.count("<|im_start|>user") == 2


def test_train_and_heldout_never_share_numbers_whatever_the_seeds(chat: Chat) -> None:
    heldout = set(numbers(ArithmeticProblems(chat, split="heldout", size=2000, seed=1)))
    for seed in range(3):
        train = numbers(ArithmeticProblems(chat, split="train", size=5000, seed=seed))
        assert len(set(train)) == 5000
        assert not heldout & set(train)


def test_about_a_fifth_of_all_problems_is_held_out(chat: Chat) -> None:
    other = set(numbers(ArithmeticProblems(chat, split="train", size=10_000, seed=0, split_seed=1)))
    heldout = set(numbers(ArithmeticProblems(chat, split="heldout", size=10_000, seed=0)))
    # 117,480 triples in all: 10,000 of the other split's training set, HELDOUT_PERCENT of which this split holds out.
    expected = 10_000 * HELDOUT_PERCENT / 100 * 10_000 / (117_480 * HELDOUT_PERCENT / 100)
    assert len(other & heldout) == pytest.approx(expected, rel=0.1)


def test_problems_follow_from_the_seed(chat: Chat) -> None:
    first = ArithmeticProblems(chat, split="train", size=100, seed=4)
    assert first.row(0) == {"question": "Largest of 64, 90, 97?", "answer": "97"}
    assert numbers(first) == numbers(ArithmeticProblems(chat, split="train", size=100, seed=4))
    assert numbers(first) != numbers(ArithmeticProblems(chat, split="train", size=100, seed=5))


def test_what_cannot_be_is_refused(chat: Chat) -> None:
    with pytest.raises(ConfigError, match="split='test': must be"):
        ArithmeticProblems(chat, split="test", size=5, seed=0)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="size=0: must be between"):
        ArithmeticProblems(chat, split="train", size=0, seed=0)
