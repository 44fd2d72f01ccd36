"""reasoning-gym: any data set by name, its own verifier, held-out questions that training does not have."""

from __future__ import annotations

from typing import Any

import pytest

from framework.data.chat import Chat
from framework.environments.catalog import EnvironmentConfig, build_problems
from framework.errors import ConfigError
from framework.types import Completion
from tests.fakes import tiny_tokenizer

CHAT = Chat(tiny_tokenizer())


def build(split: str = "train", seed: int = 0, **args: object) -> Any:
    return build_problems(EnvironmentConfig(name="reasoning_gym", args=args), CHAT, split=split, seed=seed)


def earned(problems: Any, said: str, index: int = 0) -> tuple[float, float]:
    token_ids = CHAT.tokens(said + CHAT.eos_token)
    completion = Completion(
        token_ids=token_ids, sampling_logprobs=(0.0,) * len(token_ids), stop_reason="stop", adapter=None
    )
    result = problems.make(index).step(completion)
    return result.reward, result.metrics["correct"]


def test_the_verifier_judges_what_stands_in_the_tag() -> None:
    problems = build(dataset="chain_sum")
    right = problems.entry(0)["answer"]
    assert earned(problems, f"I think <answer> {right} </answer>") == (1.0, 1.0)
    assert earned(problems, f"<answer>{int(right) + 1}</answer>") == (0.0, 0.0)
    assert earned(problems, right) == (0.0, 0.0)  # outside the tag
    assert earned(problems, f"<answer>1</answer> no: <answer>{right}</answer>") == (1.0, 1.0)


def test_without_a_tag_the_whole_completion_is_the_answer() -> None:
    problems = build(dataset="chain_sum", tag=None, system=None)
    assert earned(problems, f" {problems.entry(2)['answer']}\n", 2) == (1.0, 1.0)
    assert "system" not in CHAT.decode(problems.make(0).observe().token_ids)


def test_settings_reach_the_data_set() -> None:
    problems = build(dataset="chain_sum", config={"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1})
    assert all(len(problems.entry(index)["metadata"]["expression"].split()) == 3 for index in range(20))


@pytest.mark.parametrize(("tag", "said"), [(None, "{}"), ("answer", "<answer>{}</answer>")])
def test_examples_are_shown_solved_and_neither_trained_on_nor_held_out(tag: str | None, said: str) -> None:
    wanted: dict[str, Any] = {"dataset": "chain_sum", "size": 30, "heldout_size": 30, "tag": tag}
    plain, train, heldout = build(**wanted), build(**wanted, examples=2), build("heldout", **wanted, examples=2)
    shown = build(**{**wanted, "size": 32})
    for problems in (train, heldout):
        text = CHAT.decode(problems.make(3).observe().token_ids)
        for index in (30, 31):
            question, answer = shown.entry(index)["question"], said.format(shown.entry(index)["answer"])
            assert (
                text.index(question)
                < text.index(answer, text.index(question))
                < text.index(problems.entry(3)["question"])
            )
            assert question not in {problems.entry(i)["question"] for i in range(len(problems))}
    assert [train.entry(i)["question"] for i in range(30)] == [plain.entry(i)["question"] for i in range(30)]


def test_examples_that_cannot_be_shown_are_refused() -> None:
    for wrong in (-1, "two"):
        with pytest.raises(ConfigError, match=f"examples={wrong}: must be a number of problems, 0 or more"):
            build(dataset="chain_sum", size=5, examples=wrong)
    with pytest.raises(ConfigError, match="propositional_logic of reasoning-gym names no answer; use examples=0"):
        build(dataset="propositional_logic", size=5, examples=1)


@pytest.mark.parametrize("name", ["countdown", "leg_counting", "spell_backward", "number_sorting", "basic_arithmetic"])
def test_any_data_set_is_deterministic_and_its_own_answer_is_right(name: str) -> None:
    first, second = build(dataset=name, size=5, seed=3), build(dataset=name, size=5, seed=3)
    for index in range(5):
        assert first.entry(index)["question"] == second.entry(index)["question"]
        answer = first.entry(index)["answer"] or first.entry(index)["metadata"]["expression"]
        assert earned(first, f"<answer>{answer}</answer>", index) == (1.0, 1.0)
    assert build(dataset=name, size=5, seed=4).entry(0)["question"] != first.entry(0)["question"]


def test_heldout_questions_are_not_trained_on_even_where_few_exist() -> None:
    small = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}  # 162 questions in all
    train = build(dataset="chain_sum", size=100, config=small)
    heldout = build("heldout", dataset="chain_sum", size=100, heldout_size=50, config=small)
    questions = [heldout.entry(index)["question"] for index in range(len(heldout))]
    assert 10 <= len(questions) == len(set(questions)) <= 50
    assert not set(questions) & {train.entry(index)["question"] for index in range(100)}


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"dataset=chain_sums: .*did you mean chain_sum"):
        build(dataset="chain_sums")
    with pytest.raises(ConfigError, match=r"chain_sum of reasoning-gym says: .*terms"):
        build(dataset="chain_sum", config={"terms": 3})
    with pytest.raises(ConfigError, match=r"needs environment\.args\.dataset"):
        build()
    tiny = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    with pytest.raises(ConfigError, match="has no problem that the 5000 to train on do not have"):
        build("heldout", dataset="chain_sum", size=5000, config=tiny)
