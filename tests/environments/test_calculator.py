"""The calculator: several turns through collect(), a tool that computes and cannot be abused."""

from __future__ import annotations

from typing import Any

import pytest

from framework.data.chat import Chat
from framework.engine.base import SampleRequest
from framework.environments.calculator import CalculatorEnvironment, calculate
from framework.environments.catalog import EnvironmentConfig, build_problems
from framework.errors import ConfigError, DataError
from framework.rollout import collect
from framework.types import AdapterRef, SamplingParams
from tests.fakes import CHATML, OneRank, ScriptedEngine, tiny_tokenizer

CHAT = Chat(tiny_tokenizer())
REF = AdapterRef(name="policy", version=1, content_hash="aa")


class Sums:
    """One problem, 17 * 23 + 4."""

    def __len__(self) -> int:
        return 1

    def problem_id(self, index: int) -> str:
        return f"sums/{index}"

    def make(self, index: int) -> CalculatorEnvironment:
        return CalculatorEnvironment(CHAT, expression="17 * 23 + 4")


def play(*said: str, max_turns: int = 4) -> Any:
    """The rollout of a model that says these things, one a turn."""

    def answer(request: SampleRequest) -> tuple[int, ...]:
        turn = int(request.request_id.rpartition("/")[2])
        return CHAT.tokens(said[turn] + CHAT.eos_token)

    result = collect(
        ScriptedEngine(answer),
        REF,
        Sums(),
        [0],
        group_size=1,
        sampling=SamplingParams(max_tokens=60),
        seed=0,
        step=0,
        coordinator=OneRank(),
        max_turns=max_turns,
    )
    return result.groups[0].rollouts[0]


def test_the_model_asks_is_told_and_answers() -> None:
    rollout = play("<calc>17*23</calc>", "<calc>391 + 4</calc>", "<answer>395</answer>")
    assert (rollout.reward, rollout.num_turns) == (1.0, 3)
    assert rollout.metrics == {"calls": 2.0, "correct": 1.0}
    text = CHAT.decode(rollout.token_ids)
    assert text.endswith(
        "<|im_start|>assistant\n<calc>17*23</calc><|im_end|>\n"
        "<|im_start|>user\nResult: 391<|im_end|>\n"
        "<|im_start|>assistant\n<calc>391 + 4</calc><|im_end|>\n"
        "<|im_start|>user\nResult: 395<|im_end|>\n"
        "<|im_start|>assistant\n<answer>395</answer><|im_end|>"
    )
    sampled = [token for token, mask in zip(rollout.token_ids, rollout.loss_mask, strict=True) if mask]
    assert CHAT.decode(sampled) == (
        "<calc>17*23</calc><|im_end|><calc>391 + 4</calc><|im_end|><answer>395</answer><|im_end|>"
    )


@pytest.mark.parametrize(
    ("said", "num_turns"),
    [(["<answer>394</answer>"], 1), (["It is 395."], 1), (["<calc>1/0</calc>", "<answer>0</answer>"], 2)],
)
def test_what_does_not_solve_it_earns_nothing(said: list[str], num_turns: int) -> None:
    rollout = play(*said)
    assert (rollout.reward, rollout.metrics["correct"], rollout.num_turns) == (0.0, 0.0, num_turns)


def test_asking_for_ever_ends_at_max_turns() -> None:
    rollout = play(*["<calc>1+1</calc>"] * 9, max_turns=3)
    assert (rollout.reward, rollout.num_turns, rollout.metrics) == (0.0, 3, {"calls": 3.0})


@pytest.mark.parametrize(("expression", "value"), [("2*(3+4)", 14), ("-5 - -3", -2), (" 12 ", 12)])
def test_calculate(expression: str, value: int) -> None:
    assert calculate(expression) == value


@pytest.mark.parametrize(
    "expression", ["", "2**9", "1/2", "1.5", "__import__('os')", "True", "9" * 40, "(" * 9000, "a", "1;2", "10**9**9"]
)
def test_the_tool_computes_nothing_else(expression: str) -> None:
    with pytest.raises(ValueError, match=r"not a sum|only whole numbers|too large"):
        calculate(expression)


def test_splits_share_no_problem_and_templates_are_checked() -> None:
    def build(split: str, chat: Chat = CHAT, **args: object) -> Any:
        return build_problems(EnvironmentConfig(name="calculator", args=args), chat, split=split, seed=1)

    train, heldout = set(build("train")._expressions), set(build("heldout")._expressions)
    assert (len(train), len(heldout), train & heldout) == (2000, 256, set())
    with pytest.raises(ConfigError, match="num_digits=9: must be between"):
        build("train", num_digits=9)
    with pytest.raises(DataError, match="changes the turn"):
        build("train", Chat(tiny_tokenizer("{{ messages | length }}" + CHATML)))
