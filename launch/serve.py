"""``torchrun --nproc_per_node=N launch/serve.py``: the service. Keys on the command line win over the environment."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from framework.errors import FrameworkError, end_with
from framework.service.opening import open_and_serve
from framework.service.settings import arguments_from_env, schema, split

CONF = Path(__file__).resolve().parent.parent / "conf"
ConfigStore.instance().store(name="schema", node=schema())


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="serve")
def main(composed: DictConfig) -> None:
    """Opens the engines and serves."""
    try:
        open_and_serve(*split(OmegaConf.to_container(composed, resolve=True)))
    except FrameworkError as error:  # what a user can cause is one message, not a traceback
        end_with(error)


if __name__ == "__main__":
    try:
        sys.argv[1:1] = arguments_from_env(os.environ)
        main()
    except FrameworkError as error:
        end_with(error)
