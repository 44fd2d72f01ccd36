"""The command line's keys and choices: what is misspelt is named with the nearest that exists."""

from __future__ import annotations

import pytest

from framework.errors import ConfigError
from framework.overrides import check_overrides, with_prefixes

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
        ("rollout.max_lag=1", "'rollout.max_lag=1': this recipe does not use 'rollout.max_lag'"),
        ("+algorithm=gpso", "did you mean 'gspo'?"),
        ("algorithm.clip_hihg=0.3", "did you mean 'algorithm.clip_high'?"),
        ("grpo", "'grpo' is not key=value"),
        ("num_steps", "'num_steps' is not key=value; did you mean 'num_steps'?"),
    ],
)
def test_what_is_misspelt_or_useless_is_refused(argument: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("?", "\\?")):
        check_overrides(["+recipe=grpo", argument], GROUPS, unused=("data", "rollout.max_lag"))


def test_what_is_known_or_free_is_accepted() -> None:
    arguments = ["+recipe=grpo", "algorithm=gspo", "algorithm.clip_high=0.3", "+environment.args.size=3", "--help"]
    arguments += ["--cfg", "job", "-c", "all"]
    arguments += ["environment=gsm8k", "hydra.run.dir=x", "+environment.reward_args.power=2", "algorithm.loss=a.b"]
    assert check_overrides(arguments, GROUPS, unused=("data", "rollout.max_lag")) is None


def test_keys_get_the_signs_that_hydra_wants() -> None:
    given = ["recipe=grpo", "+algorithm=gspo", "environment.args.size=9", "+environment.reward_args.power=2"]
    given += ["+resume=auto", "lora.rank=8", "+num_steps=3", "--cfg", "job", "~environment.args.size"]
    wanted = ["+recipe=grpo", "algorithm=gspo", "++environment.args.size=9", "++environment.reward_args.power=2"]
    wanted += ["resume=auto", "lora.rank=8", "+num_steps=3", "--cfg", "job", "~environment.args.size"]
    assert with_prefixes(given, GROUPS) == wanted
