"""Question and answer environments: the prompt, the reward's arguments, and what a malformed row says."""

from __future__ import annotations

import pytest

from framework.data.chat import Chat
from framework.environments.base import Reward
from framework.environments.rewards import exact_match
from framework.environments.single_turn import SingleTurnProblems
from framework.errors import DataError, EnvironmentFailure
from framework.types import Completion
from tests.fakes import tiny_tokenizer


def length_reward(completion: str, *, goal: int, **_: object) -> float:
    return -abs(len(completion) - goal)


def divides_by_goal(completion: str, *, goal: int, **_: object) -> float:
    return len(completion) / goal


def problems(row: dict[str, object], reward: Reward = exact_match, system: str | None = None) -> SingleTurnProblems:
    return SingleTurnProblems([row], name="toy", chat=Chat(tiny_tokenizer()), reward=reward, system=system)


def said(text: str) -> Completion:
    token_ids = Chat(tiny_tokenizer()).tokens(text + "<|im_end|>")
    return Completion(token_ids=token_ids, sampling_logprobs=(0.0,) * len(token_ids), stop_reason="stop", adapter=None)


def test_a_question_becomes_the_users_message() -> None:
    chat = Chat(tiny_tokenizer())
    prompt = problems({"question": "2+2?"}, system="be brief").make(0).observe()
    assert chat.decode(prompt.token_ids) == (
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_messages_are_taken_as_they_are() -> None:
    chat = Chat(tiny_tokenizer())
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    prompt = problems({"messages": messages}).make(0).observe()
    assert prompt == chat.prompt(messages)


def test_the_reward_gets_the_text_without_special_tokens_and_the_row() -> None:
    result = problems({"question": "?", "goal": 5}, length_reward).make(0).step(said("abc"))
    assert (result.reward, result.done) == (-2, True)


def test_a_reward_that_raises_is_named() -> None:
    environment = problems({"question": "?", "goal": 0}, divides_by_goal).make(0)
    with pytest.raises(EnvironmentFailure, match=r"reward .*test_single_turn.divides_by_goal raised ZeroDivisionError"):
        environment.step(said("abc"))


@pytest.mark.parametrize("row", [{}, {"question": ""}, {"question": 4}, {"prompt": "x"}])
def test_a_row_without_a_question_names_itself_and_its_keys(row: dict[str, object]) -> None:
    with pytest.raises(DataError, match=r"toy/0 \(row 0\): needs 'question'.*it has the keys"):
        problems(row).make(0)


def test_an_empty_data_set_is_refused() -> None:
    with pytest.raises(DataError, match="'toy' has no problems"):
        SingleTurnProblems([], name="toy", chat=Chat(tiny_tokenizer()), reward=exact_match)
