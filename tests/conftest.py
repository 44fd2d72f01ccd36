"""What every test shares: tests marked ``gpu`` are skipped where there is no accelerator; tiny checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests import tiny_models


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--all-faults``: every case of tests/faults/, not only the representative ones."""
    parser.addoption("--all-faults", action="store_true", help="run every case of tests/faults/ (make faults)")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Adds the skip, with its reason, to the tests that need what this machine lacks."""
    if torch.accelerator.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu") is not None:  # not a folder of that name
            item.add_marker(pytest.mark.skip(reason="needs an accelerator"))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folder of every tiny checkpoint, see :mod:`tests.tiny_models`."""
    return tiny_models.make_all(tmp_path_factory.mktemp("tiny"))
