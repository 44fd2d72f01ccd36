"""The fixtures of :mod:`tests.service.server`, for the tests of this folder."""

from tests.service.server import config, running

__all__ = ["config", "running"]
