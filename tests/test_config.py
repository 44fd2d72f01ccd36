"""The command line's keys and choices: what is misspelt is named with the nearest that exists."""

from __future__ import annotations

import pytest

from framework.config import RunConfig, check_overrides, flatten, plain, schema, to_typed
from framework.errors import ConfigError

GROUPS = {"algorithm": ["grpo", "gspo", "rloo"], "recipe": ["grpo", "dpo"], "environment": ["gsm8k"]}


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("algorithm=gpso", "unknown algorithm in 'algorithm=gpso'; did you mean 'gspo'?; one of grpo, gspo, rloo"),
        ("+recipe=gprpo", "unknown recipe in '\\+recipe=gprpo'; did you mean 'grpo'?"),
        ("environment=gms8k", "did you mean 'gsm8k'?"),
        ("optimiser.learning_rate=1", "unknown key 'optimiser.learning_rate'.*did you mean 'optimizer.learning_rate'?"),
        ("num_step=3", "did you mean 'num_steps'?"),
        ("data.batch_size=3", "does not use the section 'data'"),
    ],
)
def test_what_is_misspelt_or_useless_is_refused(argument: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("?", "\\?")):
        check_overrides(["+recipe=grpo", argument], GROUPS, unused_sections=("data",))


def test_what_is_known_or_free_is_accepted() -> None:
    arguments = ["+recipe=grpo", "algorithm=gspo", "algorithm.clip_high=0.3", "+environment.args.size=3", "--help"]
    arguments += ["environment=gsm8k", "hydra.run.dir=x", "+environment.reward_args.power=2", "algorithm.loss=a.b"]
    assert check_overrides(arguments, GROUPS, unused_sections=("data",)) is None


def test_the_schema_is_the_defaults_and_comes_back_typed() -> None:
    assert to_typed(schema()) == RunConfig()
    assert flatten(plain(RunConfig()))["dpo.beta"] == 0.1


def test_environments_of_an_evaluation_are_typed_one_by_one() -> None:
    cfg = to_typed({"evaluation": {"environments": [{"name": "gsm8k"}, {"name": "math", "args": {"size": 3}}]}})
    assert [environment.name for environment in cfg.evaluation.environments] == ["gsm8k", "math"]
    assert cfg.evaluation.environments[1].args == {"size": 3}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"evaluation": {"environments": [{"nam": "x"}]}},
            "unknown key .evaluation.environments.nam.; did you mean .name",
        ),
        ({"evaluation": {"num_samples": 0}}, "evaluation.num_samples=0: must be at least 1"),
        ({"dpo": {"beta": -1.0}}, "beta=-1.0 of the DPO loss"),
        ({"distill": {"techer": "x"}}, "did you mean 'teacher'"),
        ({"num_steps": "many"}, "num_steps='many': must be of type int, not str"),
        ({"num_steps": True}, "num_steps=True: must be of type int, not bool"),
        ({"data": {"too_long": "cut"}}, "must be one of"),
        ({"optimizer": 3}, "optimizer=3: must be a section"),
    ],
)
def test_a_value_that_cannot_be_is_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        to_typed(values)
