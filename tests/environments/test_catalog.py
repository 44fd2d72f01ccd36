"""The catalog: names and dotted paths to problems, and errors that name the key and what is near."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from framework.data.chat import Chat
from framework.environments.arithmetic import ArithmeticProblems
from framework.environments.base import Reward
from framework.environments.catalog import (
    ENVIRONMENTS,
    EnvironmentConfig,
    build_problems,
    check_environment,
    load_reward,
)
from framework.environments.single_turn import SingleTurnProblems
from framework.errors import ConfigError
from tests.fakes import tiny_tokenizer


class LengthGoal:
    """A reward with a setting."""

    def __init__(self, goal: int) -> None:
        self._goal = goal

    def __call__(self, completion: str, **_: object) -> float:
        return -abs(len(completion) - self._goal)


def scaled(completion: str, *, scale: float = 1.0, **_: object) -> float:
    return scale * len(completion)


def own_problems(chat: Chat, *, split: str, seed: int, reward: Reward, word: str) -> SingleTurnProblems:
    return SingleTurnProblems([{"question": f"{word} {split} {seed}"}], name="own", chat=chat, reward=reward)


def no_default(chat: Chat, *, split: str, seed: int, path: str) -> SingleTurnProblems:
    raise AssertionError("not built")


HERE = __name__


def build(config: EnvironmentConfig, split: str = "train") -> Any:
    return build_problems(config, Chat(tiny_tokenizer()), split=split, seed=5)


def test_the_default_is_arithmetic_with_disjoint_splits() -> None:
    train, heldout = build(EnvironmentConfig()), build(EnvironmentConfig(), "heldout")
    assert isinstance(train, ArithmeticProblems)
    assert (len(train), len(heldout)) == (2000, 256)
    assert (train.problem_id(3), heldout.problem_id(3)) == ("arithmetic/train/3", "arithmetic/heldout/3")


def test_arguments_reach_the_builder() -> None:
    assert len(build(EnvironmentConfig(args={"size": 7}))) == 7


def test_a_builder_and_a_reward_of_ones_own() -> None:
    config = EnvironmentConfig(
        name=f"{HERE}.own_problems", args={"word": "hello"}, reward=f"{HERE}.scaled", reward_args={"scale": 2.0}
    )
    problems = build(config)
    assert "hello train 5" in Chat(tiny_tokenizer()).decode(problems.make(0).observe().token_ids)
    assert problems._reward("abc", other=1) == 6.0


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (EnvironmentConfig(name="no.such"), r"environment\.name=no\.such: cannot import it"),
        (EnvironmentConfig(args={"sice": 3}), r"environment\.args\.sice: .* did you mean size"),
        (EnvironmentConfig(args={"seed": 3}), r"environment\.args\.seed: .*has no such argument"),
        (EnvironmentConfig(reward=f"{HERE}.scaled"), "environment arithmetic computes its own reward"),
        (EnvironmentConfig(reward_args={"a": 1}), "reward_args is set but environment.reward is not"),
        (EnvironmentConfig(name=f"{HERE}.no_default"), "needs environment.args.path"),
        (EnvironmentConfig(name=f"{HERE}.own_problems", reward=f"{HERE}.HERE"), "is a str, must be a function or a"),
        (
            EnvironmentConfig(name=f"{HERE}.own_problems", reward=f"{HERE}.nothing"),
            "environment.reward=.*cannot import",
        ),
    ],
)
def test_what_cannot_be_built_names_the_key(config: EnvironmentConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_environment(config)
    with pytest.raises(ConfigError, match=message):
        build(config)


def test_a_reward_class_that_lacks_an_argument_names_it() -> None:
    config = EnvironmentConfig(name=f"{HERE}.own_problems", args={"word": "a"}, reward=f"{HERE}.LengthGoal")
    with pytest.raises(ConfigError, match=r"missing 1 required .*'goal'"):
        build(config)


def test_an_unknown_name_is_refused_before_anything_is_built() -> None:
    with pytest.raises(ConfigError, match=r"environment\.name=aritmetic: unknown, did you mean arithmetic\?"):
        EnvironmentConfig(name="aritmetic")


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(ConfigError, match="split='test': must be one of"):
        build(EnvironmentConfig(), "test")


def test_a_reward_class_is_made_with_its_arguments() -> None:
    reward: Callable[..., float] = load_reward(f"{HERE}.LengthGoal", {"goal": 5})
    assert reward("abc", question="x") == -2


CONF = Path(__file__).parents[2] / "conf" / "environment"


@pytest.mark.parametrize("file", sorted(CONF.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_file_of_the_group_is_a_configuration_of_a_known_environment(file: Path) -> None:
    config = EnvironmentConfig(**yaml.safe_load(file.read_text()))
    assert config.name in ENVIRONMENTS
    assert set(config.args) <= set(inspect.signature(ENVIRONMENTS[config.name]).parameters)


def test_every_environment_has_a_file_of_its_name() -> None:
    assert {file.stem for file in CONF.glob("*.yaml")} >= set(ENVIRONMENTS)
