"""Recipes: one readable file per method, and the table launch/train.py chooses from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from framework.config import RunConfig
from framework.runtime import open_sampling, open_training
from recipes import grpo, sft


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One row of :data:`RECIPES`."""

    run: Callable[[RunConfig], None]
    unused: tuple[str, ...]
    """Sections of the configuration that it does not read; setting a key in one is an error."""


RECIPES: dict[str, Recipe] = {
    "grpo": Recipe(run=lambda cfg: grpo.run(cfg, open_sampling(cfg)), unused=("data",)),
    "sft": Recipe(
        run=lambda cfg: sft.run(cfg, open_training(cfg)),
        unused=("algorithm", "environment", "engine", "sampling", "rollout", "parity"),
    ),
}
