"""``torchrun launch/train.py +recipe=grpo``: runs a recipe; any key can be set on the command line."""

from __future__ import annotations

import sys
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from framework.config import schema, to_typed
from framework.errors import FrameworkError, end_with
from framework.overrides import check_overrides, with_prefixes
from recipes import RECIPES, choose

CONF = Path(__file__).resolve().parent.parent / "conf"
ConfigStore.instance().store(name="schema", node=schema())


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def main(composed: DictConfig) -> None:
    """Runs the recipe that the configuration names."""
    try:
        cfg = to_typed(composed)
        choose(cfg.recipe).run(cfg)
    except FrameworkError as error:  # what a user can cause is one message, not a traceback
        end_with(error)


if __name__ == "__main__":
    try:
        groups = {folder.name: [file.stem for file in folder.glob("*.yaml")] for folder in CONF.glob("*/")}
        sys.argv[1:] = with_prefixes(sys.argv[1:], groups)
        recipe = next((a.partition("=")[2] for a in sys.argv[1:] if a.startswith("+recipe=")), "grpo")
        unused = RECIPES[recipe].unused if recipe in RECIPES else ()
        check_overrides(sys.argv[1:], groups, unused)
        main()
    except FrameworkError as error:
        end_with(error)
