"""The catalog: names, the YAML files that say the same, what is built from them, and errors that help."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

from framework.algorithms.base import LossInputs, LossOutput
from framework.algorithms.catalog import ALGORITHMS, AlgorithmConfig, algorithm_config, build_algorithm
from framework.algorithms.composition import ComposedLoss
from framework.algorithms.corrections import IcePop
from framework.algorithms.losses import CISPO, GSPO, ImportanceSampling, PPOClip
from framework.errors import ConfigError
from tests.algorithms.loss_cases import by_hand, value_and_gradient

CONF = Path(__file__).parents[2] / "conf" / "algorithm"
DEFAULTS = dataclasses.asdict(AlgorithmConfig())


def my_estimator(rewards: Tensor, group_ids: Tensor) -> Tensor:
    return rewards * 10.0


def my_loss(inputs: LossInputs) -> LossOutput:
    return LossOutput(per_token=-inputs.logprobs * 3.0)


def test_every_algorithm_has_a_file_and_every_file_an_algorithm() -> None:
    assert {path.stem for path in CONF.glob("*.yaml")} == set(ALGORITHMS)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_file_says_what_the_catalog_says_and_nothing_that_is_a_default(name: str) -> None:
    keys = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    assert AlgorithmConfig(**keys) == ALGORITHMS[name]
    assert keys.pop("name") == name
    assert {key for key, value in keys.items() if value == DEFAULTS[key]} == set()


def test_what_is_built() -> None:
    policies = {name: _loss(config).policy for name, config in ALGORITHMS.items()}
    assert policies == {
        "grpo": PPOClip(),
        "dr_grpo": PPOClip(),
        "dapo": PPOClip(clip_low=0.2, clip_high=0.28),
        "rloo": ImportanceSampling(),
        "reinforce_pp": PPOClip(),
        "reinforce_pp_baseline": PPOClip(),
        "gspo": GSPO(clip_low=3e-4, clip_high=4e-4),
        "cispo": CISPO(clip_low=1.0, clip_high=4.0),
        "ppo": PPOClip(dual_clip=3.0),
    }
    aggregations = {name: build_algorithm(config, max_tokens=64).aggregation for name, config in ALGORITHMS.items()}
    assert aggregations == {
        "grpo": "sequence_mean",
        "dr_grpo": "constant",
        "dapo": "token_mean",
        "rloo": "constant",
        "reinforce_pp": "token_mean",
        "reinforce_pp_baseline": "token_mean",
        "gspo": "sequence_mean",
        "cispo": "token_mean",
        "ppo": "token_mean",
    }
    assert build_algorithm(ALGORITHMS["dapo"], max_tokens=20480).overlong_buffer_tokens == 4096


def test_kl_goes_where_it_is_asked() -> None:
    in_loss = build_algorithm(AlgorithmConfig(kl_coef=0.1, kl_estimator="k2"), max_tokens=8)
    assert isinstance(in_loss.loss, ComposedLoss)
    assert in_loss.loss.kl is not None
    assert (in_loss.loss.kl.coef, in_loss.loss.kl.estimator.__name__) == (0.1, "k2")
    assert (in_loss.reward_kl_coef, in_loss.needs_ref_logprobs) == (0.0, True)
    in_reward = build_algorithm(AlgorithmConfig(kl_coef=0.1, kl_in="reward"), max_tokens=8)
    assert isinstance(in_reward.loss, ComposedLoss)
    assert in_reward.loss.kl is None
    assert (in_reward.reward_kl_coef, in_reward.needs_ref_logprobs) == (0.1, True)
    assert not build_algorithm(AlgorithmConfig(), max_tokens=8).needs_ref_logprobs


def test_bounds_reach_the_parts() -> None:
    config = AlgorithmConfig(loss="gspo", clip_high=0.01, correction="icepop", correction_low=0.25)
    assert _loss(config) == ComposedLoss(policy=GSPO(clip_high=0.01), correction=IcePop(low=0.25))


def test_parts_of_the_users_own_by_dotted_path() -> None:
    config = AlgorithmConfig(advantage=f"{__name__}.my_estimator", loss=f"{__name__}.my_loss")
    algorithm = build_algorithm(config, max_tokens=8)
    assert algorithm.estimator(torch.tensor([2.0]), torch.tensor([0])).tolist() == [20.0]
    assert _loss(config).policy.__name__ == "my_loss"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"loss": "no_such.module"}, r"algorithm\.loss=no_such\.module: cannot import it"),
        (
            {"loss": "reinforce", "clip_low": 0.1},
            r"algorithm\.clip_low=0\.1 does not apply to algorithm\.loss=reinforce",
        ),
        ({"loss": "cispo", "dual_clip": 3.0}, r"algorithm\.dual_clip=3\.0 does not apply"),
        (
            {"correction": "truncated_importance", "correction_low": 0.5},
            r"algorithm\.correction_low=0\.5 does not apply to algorithm\.correction=truncated_importance",
        ),
        ({"correction_high": 2.0}, r"algorithm\.correction_high is set but algorithm\.correction is null"),
    ],
)
def test_build_refuses(keys: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_algorithm(AlgorithmConfig(**keys), max_tokens=8)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"loss": "gpso"}, r"algorithm\.loss=gpso is unknown; did you mean gspo\?"),
        ({"advantage": "group_normalised"}, r"did you mean group_normalized\?"),
        ({"correction": "ice_pop"}, r"algorithm\.correction=ice_pop is unknown; did you mean icepop\?"),
        ({"aggregation": "token-mean"}, r"algorithm\.aggregation=token-mean is unknown; did you mean token_mean\?"),
        ({"kl_in": "rewards"}, r"did you mean reward\?"),
        ({"kl_estimator": "k4"}, r"algorithm\.kl_estimator=k4 is unknown"),
        ({"overlong_buffer": 4096}, r"algorithm\.overlong_buffer=4096: a fraction"),
        ({"entropy_coef": -0.1}, r"algorithm\.entropy_coef=-0\.1: must be at least 0"),
    ],
)
def test_config_refuses(keys: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AlgorithmConfig(**keys)  # type: ignore[arg-type]


def test_bf16_noise_between_engine_and_trainer_clips_nothing_of_gspo() -> None:
    """Ratios 1% off either way, 30 times GSPO's clip range; on-policy every token keeps its gradient, k A."""
    inputs = by_hand(
        [[-1.0, -2.0], [-1.0, -2.0]],
        sampling_logprobs=[[-1.01, -2.01], [-0.99, -1.99]],
        advantages=[[1.0, 1.0], [-1.0, -1.0]],
    )
    loss = _loss(ALGORITHMS["gspo"])
    _, gradient = value_and_gradient(loss, inputs)
    k = math.exp(0.01)
    assert gradient == pytest.approx([-k, -k, 1 / k, 1 / k])
    _, uncorrected = value_and_gradient(loss.policy, inputs)
    assert uncorrected == [0.0] * 4


def test_an_unknown_name_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"algorithm\.name=drgrpo is unknown; did you mean dr_grpo\? one of grpo, "):
        algorithm_config("drgrpo")


def _loss(config: AlgorithmConfig) -> ComposedLoss:
    loss = build_algorithm(config, max_tokens=64).loss
    assert isinstance(loss, ComposedLoss)
    return loss
