"""Recipes: one readable file per method, and the table launch/train.py chooses from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from framework.config import RunConfig
from framework.runtime import open_sampling, open_training
from recipes import distill, dpo, evaluate, grpo, sft


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One row of :data:`RECIPES`."""

    run: Callable[[RunConfig], None]
    unused: tuple[str, ...]
    """Sections of the configuration that it does not read; setting a key in one is an error."""



def _evaluate(cfg: RunConfig) -> None:
    prepared = evaluate.prepare(cfg)
    evaluate.run(prepared, open_sampling(prepared))


SAMPLING = ("environment", "engine", "sampling", "rollout", "parity")
"""Sections of recipes with an engine."""

RECIPES: dict[str, Recipe] = {
    "grpo": Recipe(run=lambda cfg: grpo.run(cfg, open_sampling(cfg)), unused=("data", "dpo", "distill")),
    "sft": Recipe(run=lambda cfg: sft.run(cfg, open_training(cfg)), unused=(*SAMPLING, "algorithm", "dpo", "distill")),
    "dpo": Recipe(run=lambda cfg: dpo.run(cfg, open_training(cfg)), unused=(*SAMPLING, "algorithm", "distill")),
    "distill": Recipe(run=lambda cfg: distill.run(cfg, open_sampling(cfg)), unused=("data", "dpo", "algorithm")),
    "evaluate": Recipe(
        run=_evaluate,
        unused=("data", "dpo", "distill", "algorithm", "optimizer", "parity", "checkpoint", "lora"),
    ),
}
