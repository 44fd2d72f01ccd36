"""What every test shares: tests marked ``gpu`` are skipped where there is no accelerator."""

from __future__ import annotations

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Adds the skip, with its reason, to the tests that need what this machine lacks."""
    if torch.accelerator.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs an accelerator"))
