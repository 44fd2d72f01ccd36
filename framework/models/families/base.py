"""What a model family has to say: how to read its config, and its layer's layout table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from framework.models.layout import Entry
from framework.models.spec import ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One row of :data:`framework.models.families.FAMILIES`."""

    spec: Callable[[Mapping[str, Any]], ModelSpec]
    """From the parsed ``config.json``."""
    layer: tuple[Entry, ...]
    """The layout of one layer."""
