"""Every algorithm by name, and how a name's configuration becomes an :class:`Algorithm`.

An algorithm is a combination: an advantage estimator, a policy loss, an aggregation, and what is done about long
rollouts, uninformative groups, the base model and the engine's logprobs. ``ALGORITHMS`` is the whole list; the files in
``conf/algorithm`` say the same for the command line, and a test compares them. An estimator, loss or correction of your
own is a dotted path in its key.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast, get_args

from framework.algorithms import advantages, corrections, losses
from framework.algorithms.algorithm import Algorithm
from framework.algorithms.base import Aggregation, LossFn
from framework.algorithms.composition import ComposedLoss, KLTerm
from framework.algorithms.corrections import Correction
from framework.algorithms.kl import KL_ESTIMATORS
from framework.errors import ConfigError


def _choose(key: str, name: str, allowed: Mapping[str, object] | tuple[str, ...]) -> None:
    if name not in allowed:
        near = difflib.get_close_matches(name, list(allowed), n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(f"algorithm.{key}={name} is unknown; {hint}one of {', '.join(allowed)}")


ADVANTAGES: Mapping[str, advantages.RolloutEstimator] = {
    "group_normalized": advantages.group_normalized,
    "group_centered": advantages.group_centered,
    "leave_one_out": advantages.leave_one_out,
    "uncentered": advantages.uncentered,
}

LOSSES: Mapping[str, Callable[..., LossFn]] = {
    "ppo_clip": losses.PPOClip,
    "gspo": losses.GSPO,
    "gspo_token": losses.GSPOToken,
    "cispo": losses.CISPO,
    "importance_sampling": losses.ImportanceSampling,
    "reinforce": losses.Reinforce,
}

CORRECTIONS: Mapping[str, Callable[..., Correction]] = {
    "truncated_importance": corrections.TruncatedImportance,
    "icepop": corrections.IcePop,
    "sequence_masked_importance": corrections.SequenceMaskedImportance,
    "geometric_mask": corrections.GeometricMask,
    "off_policy_mask": corrections.OffPolicyMask,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class AlgorithmConfig:
    """The ``algorithm`` group of the configuration. The defaults are GRPO's."""

    name: str = "grpo"
    """For logs and tables."""
    advantage: str = "group_normalized"
    """A key of :data:`ADVANTAGES`, or a dotted path to an ``advantages.RolloutEstimator``."""
    batch_normalize: bool = False
    """Normalise advantages over the tokens of the global batch (REINFORCE++)."""
    loss: str = "ppo_clip"
    """A key of :data:`LOSSES`, or a dotted path to a ``base.LossFn``."""
    clip_low: float | None = None
    """The ratio's lower bound is 1 - clip_low; null keeps the loss's own default."""
    clip_high: float | None = None
    """The ratio's upper bound is 1 + clip_high; null keeps the loss's own default."""
    dual_clip: float | None = None
    """See ``losses.PPOClip``; null is off. ppo_clip only."""
    aggregation: str = "sequence_mean"
    """How per-token losses become one: token_mean, sequence_mean, constant (per rollout and token limit) or sum."""
    correction: str | None = None
    """Of the train/sample gap: a key of :data:`CORRECTIONS`, a dotted path to a ``corrections.Correction``, or null."""
    correction_low: float | None = None
    """Lower bound of the correction's ratio; null keeps the correction's own default."""
    correction_high: float | None = None
    """Upper bound; null keeps the correction's own default."""
    kl_coef: float = 0.0
    """Weight of the KL to the base model, which is the same model with the adapter off; 0 does not compute it."""
    kl_in: str = "loss"
    """loss: a term of the loss. reward: subtracted from the reward, per token and to go (always k1)."""
    kl_estimator: str = "k3"
    """k1, k2 or k3, for kl_in=loss; see ``kl.py`` for what their gradients are."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    dynamic_sampling: bool = False
    """Keep only groups whose rewards differ, and sample others in their place."""
    overlong_filter: bool = False
    """Do not train on rollouts that were cut by the token limit."""
    overlong_buffer: float = 0.0
    """Length of the ramp of the overlong penalty, as a fraction of the token limit; 0 is off."""
    overlong_factor: float = 1.0
    """The penalty at the token limit."""

    def __post_init__(self) -> None:
        for key, name, table in (
            ("advantage", self.advantage, ADVANTAGES),
            ("loss", self.loss, LOSSES),
            ("correction", self.correction, CORRECTIONS),
        ):
            if name is not None and "." not in name:
                _choose(key, name, table)
        _choose("aggregation", self.aggregation, get_args(Aggregation))
        _choose("kl_in", self.kl_in, ("loss", "reward"))
        _choose("kl_estimator", self.kl_estimator, KL_ESTIMATORS)
        if not 0.0 <= self.overlong_buffer <= 1.0:
            raise ConfigError(f"algorithm.overlong_buffer={self.overlong_buffer}: a fraction of the limit, in [0, 1]")
        for key in ("kl_coef", "entropy_coef", "overlong_factor"):
            if getattr(self, key) < 0.0:
                raise ConfigError(f"algorithm.{key}={getattr(self, key)}: must be at least 0")


ALGORITHMS: Mapping[str, AlgorithmConfig] = {
    config.name: config
    for config in (
        AlgorithmConfig(),
        AlgorithmConfig(name="dr_grpo", advantage="group_centered", aggregation="constant"),
        AlgorithmConfig(
            name="dapo",
            clip_high=0.28,
            aggregation="token_mean",
            dynamic_sampling=True,
            overlong_filter=True,
            overlong_buffer=0.2,
        ),
        AlgorithmConfig(name="rloo", advantage="leave_one_out", loss="importance_sampling", aggregation="constant"),
        AlgorithmConfig(
            name="reinforce_pp",
            advantage="uncentered",
            batch_normalize=True,
            aggregation="token_mean",
            kl_coef=0.001,
            kl_in="reward",
        ),
        AlgorithmConfig(
            name="reinforce_pp_baseline",
            advantage="group_centered",
            batch_normalize=True,
            aggregation="token_mean",
            kl_coef=0.001,
            kl_estimator="k2",
        ),
        AlgorithmConfig(name="gspo", loss="gspo", correction="truncated_importance"),
        AlgorithmConfig(name="cispo", loss="cispo", aggregation="token_mean"),
        AlgorithmConfig(
            name="ppo", advantage="uncentered", batch_normalize=True, dual_clip=3.0, aggregation="token_mean"
        ),
    )
}
"""Every algorithm, as it differs from the defaults. ``ppo`` is PPO's surrogate with dual clip on rewards normalised
over the batch: there is no value network here. ``gspo`` has a correction because its clip range of 3e-4 is narrower
than the numerical difference between engine and trainer, and a ratio against the engine's logprobs would be clipped at
random; with a correction the ratio is against the trainer's own logprobs, and the correction accounts for the rest."""


def algorithm_config(name: str) -> AlgorithmConfig:
    """The configuration of a built-in algorithm.

    Raises:
        ConfigError: there is none of that name; the message has the nearest.
    """
    _choose("name", name, ALGORITHMS)
    return ALGORITHMS[name]


def build_algorithm(config: AlgorithmConfig, *, max_tokens: int) -> Algorithm:
    """Puts an algorithm together.

    Args:
        config: which parts, and their numbers.
        max_tokens: the longest completion that can be sampled (``sampling.max_tokens``): the constant of the
            ``constant`` aggregation and the limit of the overlong penalty.

    Raises:
        ConfigError: a part is unknown, or a number does not apply to the part chosen.
    """
    in_loss = config.kl_coef > 0.0 and config.kl_in == "loss"
    return Algorithm(
        name=config.name,
        estimator=_resolve("advantage", config.advantage, ADVANTAGES),
        batch_normalize=config.batch_normalize,
        loss=ComposedLoss(
            policy=_make("loss", config.loss, LOSSES, _clip_bounds(config)),
            correction=_correction(config),
            kl=KLTerm(coef=config.kl_coef, estimator=KL_ESTIMATORS[config.kl_estimator]) if in_loss else None,
            entropy_coef=config.entropy_coef,
        ),
        aggregation=cast(Aggregation, config.aggregation),
        max_tokens=max_tokens,
        reward_kl_coef=config.kl_coef if config.kl_in == "reward" else 0.0,
        needs_ref_logprobs=config.kl_coef > 0.0,
        dynamic_sampling=config.dynamic_sampling,
        overlong_filter=config.overlong_filter,
        overlong_buffer_tokens=round(config.overlong_buffer * max_tokens),
        overlong_factor=config.overlong_factor,
    )


def _clip_bounds(config: AlgorithmConfig) -> dict[str, float | None]:
    return {"clip_low": config.clip_low, "clip_high": config.clip_high, "dual_clip": config.dual_clip}


def _correction(config: AlgorithmConfig) -> Correction | None:
    bounds = {"low": config.correction_low, "high": config.correction_high}
    if config.correction is None:
        given = [f"correction_{key}" for key, value in bounds.items() if value is not None]
        if given:
            raise ConfigError(f"algorithm.{given[0]} is set but algorithm.correction is null; choose a correction")
        return None
    correction: Correction = _make("correction", config.correction, CORRECTIONS, bounds)
    return correction


def _make(key: str, name: str, table: Mapping[str, Callable[..., Any]], numbers: Mapping[str, float | None]) -> Any:
    """A built-in of ``table`` with the numbers that are set, or the user's object as it is."""
    given = {field: value for field, value in numbers.items() if value is not None}
    part = _resolve(key, name, table)
    allowed = getattr(part, "__dataclass_fields__", {}) if name in table else {}
    for field in given:
        if field not in allowed:
            shown = f"correction_{field}" if key == "correction" else field
            raise ConfigError(f"algorithm.{shown}={given[field]} does not apply to algorithm.{key}={name}; remove it")
    return part(**given) if name in table else part


def _resolve(key: str, name: str, table: Mapping[str, Any]) -> Any:
    """``table[name]``, or the object at a dotted path."""
    if name in table or "." not in name:
        _choose(key, name, table)
        return table[name]
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"algorithm.{key}={name}: cannot import it ({error})") from error
