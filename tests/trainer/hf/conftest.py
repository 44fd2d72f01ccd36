"""Folders of the small models, made once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from framework.models.tiny import make_tiny_model


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("models")
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = make_tiny_model(root / family, family=family, vocab_size=96)
        return made[family]

    return folder
