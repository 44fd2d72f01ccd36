"""The verifiers adapter, with environments of that library: single turn, several turns, tools. Skipped without it."""

from __future__ import annotations

from typing import Any

import pytest

from framework.data.chat import Chat
from framework.engine.base import SampleRequest
from framework.environments.catalog import EnvironmentConfig, build_problems
from framework.environments.verifiers import VerifiersProblems, parse_tool_calls
from framework.errors import ConfigError, EnvironmentFailure
from framework.rollout import CollectResult, collect
from framework.types import SamplingParams
from tests.fakes import CHATML, OneRank, ScriptedEngine, tiny_tokenizer

CHAT = Chat(tiny_tokenizer())


def play(problems: VerifiersProblems, *said: str, group_size: int = 1, max_turns: int = 5) -> CollectResult:
    """Groups of a model that says these things, one a turn."""

    def answer(request: SampleRequest) -> tuple[int, ...]:
        return CHAT.tokens(said[int(request.request_id.rpartition("/")[2])] + CHAT.eos_token)

    return collect(
        ScriptedEngine(answer, max_prompt_tokens=4096),
        None,
        problems,
        list(range(len(problems))),
        group_size=group_size,
        sampling=SamplingParams(max_tokens=200),
        seed=0,
        step=0,
        coordinator=OneRank(),
        max_turns=max_turns,
        timeout_s=20.0,
    )


def test_tool_calls_are_read_and_what_is_none_stays_text() -> None:
    text = 'I add.\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    assert parse_tool_calls(text) == ("I add.", (("add", '{"a": 1}'),))
    assert parse_tool_calls('<tool_call>{"name": "f"}</tool_call>') == ("", (("f", "{}"),))
    for broken in ("<tool_call>{x}</tool_call>", '<tool_call>{"arguments": {}}</tool_call>', "no call"):
        assert parse_tool_calls(broken) == (broken, ())


def test_without_the_library_the_error_says_how_to_get_it() -> None:
    config = EnvironmentConfig(name="verifiers", args={"environment": "no-such-environment"})
    with pytest.raises(ConfigError, match=r"pip install \"verifiers==0\.1\.14\"|verifiers says: Could not import"):
        build_problems(config, CHAT, split="train", seed=0)


def data(*questions: tuple[str, str]) -> Any:
    datasets = pytest.importorskip("datasets")
    return datasets.Dataset.from_list([{"question": question, "answer": answer} for question, answer in questions])


def rows(environment: Any) -> list[dict[str, Any]]:
    return list(environment.get_dataset())


def test_a_single_turn_environment_is_scored_by_its_rubric() -> None:
    vf = pytest.importorskip("verifiers", minversion="0.1.14")

    def right(completion: Any, answer: str) -> float:
        return float(completion[-1].content == answer)

    def shortness(completion: Any) -> float:
        return -len(completion[-1].content)

    rubric = vf.Rubric(funcs=[right, shortness], weights=[2.0, 0.1])
    environment = vf.SingleTurnEnv(dataset=data(("2+2?", "4"), ("1+1?", "2")), system_prompt="Brief.", rubric=rubric)
    result = play(VerifiersProblems(CHAT, environment, rows(environment), name="toy"), "4", group_size=2)
    assert [group.rewards for group in result.groups] == [(1.9, 1.9), (-0.1, -0.1)]
    rollout = result.groups[0].rollouts[0]
    assert rollout.metrics == {"right": 1.0, "shortness": -1.0, "num_turns": 1.0}
    assert CHAT.decode(rollout.token_ids) == (
        "<|im_start|>system\nBrief.<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>"
    )


def test_a_tool_environment_calls_its_tools() -> None:
    vf = pytest.importorskip("verifiers", minversion="0.1.14")

    def add(a: int, b: int) -> str:
        """Adds.

        Args:
            a: one number
            b: another
        """
        return str(a + b)

    def right(completion: Any, answer: str) -> float:
        return float(completion[-1].content == answer)

    environment = vf.ToolEnv(dataset=data(("2+2?", "4")), tools=[add], rubric=vf.Rubric(funcs=[right]), max_turns=4)
    knows_tools = Chat(tiny_tokenizer("{% if tools %}<|im_start|>system\n{{ tools }}<|im_end|>\n{% endif %}" + CHATML))
    problems = VerifiersProblems(knows_tools, environment, rows(environment), name="tools")
    call = '<tool_call>{"name": "add", "arguments": {"a": 2, "b": 2}}</tool_call>'
    (rollout,) = play(problems, call, "4").groups[0].rollouts
    assert (rollout.reward, rollout.num_turns) == (1.0, 2)
    assert rollout.metrics["add_calls"] == 1.0
    assert CHAT.decode(rollout.token_ids).endswith(
        f"<|im_start|>assistant\n{call}<|im_end|>\n<|im_start|>tool\n4<|im_end|>\n<|im_start|>assistant\n4<|im_end|>"
    )


def test_an_environment_that_rewrites_the_conversation_or_fails_is_named() -> None:
    vf = pytest.importorskip("verifiers", minversion="0.1.14")

    several_turns: Any = vf.MultiTurnEnv

    class Forgetful(several_turns):
        async def env_response(self, messages: Any, state: Any, **_: Any) -> Any:
            return [{"role": "user", "content": "and?"}]

        async def get_prompt_messages(self, state: Any) -> Any:
            messages = await super().get_prompt_messages(state)
            return messages[-1:] if state["trajectory"] else messages

    class Failing(several_turns):
        async def env_response(self, messages: Any, state: Any, **_: Any) -> Any:
            raise RuntimeError("broken tool")

    for kind, message in ((Forgetful, "changed the conversation"), (Failing, "broken tool")):
        environment = kind(dataset=data(("2+2?", "4")), rubric=vf.Rubric(funcs=[lambda completion: 1.0]), max_turns=3)
        problems = VerifiersProblems(CHAT, environment, rows(environment), name="bad")
        with pytest.raises(EnvironmentFailure, match=f"problem bad/0, turn 1: .*{message}"):
            play(problems, "4", "4", "4")
