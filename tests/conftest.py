"""What every test shares: tests marked ``gpu`` are skipped where there is no accelerator; tiny checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests import tiny_models


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--all-faults``: every case of tests/faults/, not only the representative ones."""
    parser.addoption("--all-faults", action="store_true", help="run every case of tests/faults/ (make faults)")


SLOW = ("tests/service/test_app.py",)
"""Files that take minutes; ``make test-all`` runs them and what is marked slow, ``make test`` does not."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what is slow; adds the skip, with its reason, to the tests that need what this machine lacks."""
    root = Path(__file__).parents[1]
    for item in items:
        if any(item.path.is_relative_to(root / slow) for slow in SLOW):
            item.add_marker(pytest.mark.slow)
    if torch.accelerator.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu") is not None:  # not a folder of that name
            item.add_marker(pytest.mark.skip(reason="needs an accelerator"))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folder of every tiny checkpoint, see :mod:`tests.tiny_models`."""
    return tiny_models.make_all(tmp_path_factory.mktemp("tiny"))
