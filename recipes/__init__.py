"""Recipes: one readable file per method, and the table launch/train.py chooses from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from framework.config import RunConfig
from framework.environments.catalog import check_environment, load
from framework.errors import ConfigError
from framework.runtime import SamplingRuntime, open_sampling, open_training
from recipes import distill, dpo, evaluate, grpo, sft


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One row of :data:`RECIPES`."""

    run: Callable[[RunConfig], None]
    unused: tuple[str, ...]
    """Sections and keys of the configuration that it does not read; setting one is an error."""


def _open(cfg: RunConfig) -> SamplingRuntime:
    """The runtime of a recipe that plays environments; what is misspelt there does not wait for the engine."""
    for environment in cfg.evaluation.environments or (cfg.environment,):
        check_environment(environment)
    return open_sampling(cfg)


def _evaluate(cfg: RunConfig) -> None:
    prepared = evaluate.prepare(cfg)
    evaluate.run(prepared, _open(prepared))


SAMPLING = ("environment", "engine", "sampling", "rollout", "parity", "numerics")
"""Sections and keys of recipes with an engine."""

TABLES = ("evaluation.num_samples", "evaluation.adapter", "evaluation.environments")
"""Of the recipe evaluate; the others evaluate greedily on their own environment."""
WITHOUT_GROUPS = ("rollout.max_refills", "rollout.max_lag")
"""Of the recipe grpo."""

RECIPES: dict[str, Recipe] = {
    "grpo": Recipe(run=lambda cfg: grpo.run(cfg, _open(cfg)), unused=("data", "dpo", "distill", *TABLES)),
    "sft": Recipe(
        run=lambda cfg: sft.run(cfg, open_training(cfg)),
        unused=(*SAMPLING, "algorithm", "dpo", "distill", "evaluation.num_problems", *TABLES),
    ),
    "dpo": Recipe(
        run=lambda cfg: dpo.run(cfg, open_training(cfg)),
        unused=(*SAMPLING, "algorithm", "distill", "evaluation.num_problems", *TABLES),
    ),
    "distill": Recipe(
        run=lambda cfg: distill.run(cfg, _open(cfg)),
        unused=("data", "dpo", "algorithm", *TABLES, *WITHOUT_GROUPS),
    ),
    "evaluate": Recipe(
        run=_evaluate,
        unused=(
            *("data", "dpo", "distill", "algorithm", "optimizer", "parity", "checkpoint", "lora"),
            *("num_steps", "init_adapter", "evaluation.every", *WITHOUT_GROUPS),
        ),
    ),
}


def choose(name: str) -> Recipe:
    """The recipe of that name, or the function at a dotted path, which gets ``cfg`` and a runtime with an engine.

    Raises:
        ConfigError: there is none.
    """
    if name in RECIPES:
        return RECIPES[name]
    if "." not in name:
        raise ConfigError(f"recipe={name!r}: must be one of {sorted(RECIPES)}, or the dotted path of a function")
    function: Callable[[RunConfig, SamplingRuntime], None] = load("recipe", name)
    return Recipe(run=lambda cfg: function(cfg, open_sampling(cfg)), unused=())
