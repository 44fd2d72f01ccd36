"""The errors a user can cause or meet, each also the standard-library error it is.

A message says what was given, what is allowed, and which configuration key or file to change. Broken invariants of
our own are assertions, not these.
"""

from __future__ import annotations

import sys
from typing import NoReturn


class FrameworkError(Exception):
    """Base of every error this package raises on purpose."""


def end_with(error: FrameworkError) -> NoReturn:
    """Ends the process with one line that says what was wrong, written at once so that ranks do not mix theirs."""
    sys.stderr.write(f"error: {type(error).__name__}: {error}\n")
    sys.exit(1)


class ConfigError(FrameworkError, ValueError):
    """A configuration key has a value that cannot work; the message names the key and what is allowed."""


class ModelError(FrameworkError, ValueError):
    """A model folder or checkpoint that is missing, damaged, or of a family or shape that is not supported."""


class AdapterError(FrameworkError, ValueError):
    """An adapter that is unknown, of another shape than expected, or does not fit the engine's slots."""


class DataError(FrameworkError, ValueError):
    """A data set that is empty or has a malformed row; the message names the file and the row's number."""


class EnvironmentFailure(FrameworkError, RuntimeError):
    """An environment or a reward function raised, hung, or returned something that is not a finite number."""


class DeliveryError(FrameworkError, RuntimeError):
    """The engine does not hold, bit for bit, the adapter that was pushed; the message names the module."""


class StaleSampleError(FrameworkError, RuntimeError):
    """A sample of another adapter version than the one being trained reached the trainer."""


class LockstepError(FrameworkError, RuntimeError):
    """Ranks of one group were about to run different things; the message has every rank's value."""


class MismatchError(FrameworkError, RuntimeError):
    """The trainer's logprobs of the sampled tokens are too far from the engine's."""


class CheckpointError(FrameworkError, ValueError):
    """A checkpoint that is partial, damaged, or of another configuration than the run that loads it."""


class StorageError(FrameworkError, OSError):
    """A file could not be written completely; nothing half-written was left under its final name."""
