"""Supervised fine-tuning on demonstrations."""

from __future__ import annotations

from framework.config import RunConfig
from framework.runtime import Runtime


def run(cfg: RunConfig, rt: Runtime) -> None:
    """To come."""
    raise NotImplementedError
