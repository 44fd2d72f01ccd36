"""From YAML to dataclasses: a key or a value that cannot be is named with what can."""

from __future__ import annotations

import pytest

from framework.config import RolloutConfig, RunConfig, flatten, plain, schema, to_typed
from framework.errors import ConfigError


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
        ({"numerics": "exact", "parity": {"warn_gen_kl_error": 0.1}}, "leave the thresholds in the section parity out"),
        ({"num_steps": "many"}, "num_steps='many': must be of type int, not str"),
        ({"num_steps": True}, "num_steps=True: must be of type int, not bool"),
        ({"data": {"too_long": "cut"}}, "must be one of"),
        ({"optimizer": 3}, "optimizer=3: must be a section"),
        ({"algorithm": {"loss": "gsppo"}}, "algorithm.loss=gsppo is unknown; did you mean gspo"),
        ({"algorithm": {"correction": "icepopp"}}, "algorithm.correction=icepopp is unknown; did you mean icepop"),
        ({"algorithm": {"advantage": "leave_on_out"}}, "did you mean leave_one_out"),
        ({"environment": {"name": "gsm9k"}}, "environment.name=gsm9k: unknown, did you mean gsm8k"),
        ({"trainer": {"backend": "megatronn"}}, "trainer.backend='megatronn': must be 'megatron' or 'hf'"),
        ({"rollout": {"max_lag": -1}}, "rollout.max_lag=-1: must be at least 0"),
        ({"rollout": {"group_size": 0}}, "rollout.group_size=0: must be at least 1"),
    ],
)
def test_a_value_that_cannot_be_is_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        to_typed(values)


def test_prompts_that_do_not_divide_over_replicas_and_optimizer_steps_are_refused() -> None:
    RolloutConfig(prompts_per_step=12, max_lag=2).check_replicas(2)
    with pytest.raises(ConfigError, match=r"prompts_per_step=8, rollout.max_lag=2.*multiple of 2 .* times 3 optimizer"):
        RolloutConfig(prompts_per_step=8, max_lag=2).check_replicas(2)
    with pytest.raises(ConfigError, match=r"rollout\.prompts_per_step=1"):
        RolloutConfig(prompts_per_step=1).check_replicas(2)
    with pytest.raises(ConfigError, match=r"group_size=2 above rollout\.max_lag"):
        RolloutConfig(prompts_per_step=12, max_lag=2, group_size=2).check_replicas(1)
