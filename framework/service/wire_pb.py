"""The protobuf message classes of ``tinker.proto``, built from its compiled descriptor.

They live in a descriptor pool of their own, so that a process may also import the SDK's copy of the same messages.
"""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory


def _load() -> dict[str, Any]:
    described = descriptor_pb2.FileDescriptorSet.FromString(
        files("framework.service").joinpath("tinker.desc").read_bytes()
    )
    pool = descriptor_pool.DescriptorPool()
    for file in described.file:
        pool.Add(file)
    return message_factory.GetMessageClassesForFiles([file.name for file in described.file], pool)


MESSAGES: dict[str, Any] = {name.removeprefix("tinker_public."): cls for name, cls in _load().items()}
"""Message classes by name, e.g. ``MESSAGES["ForwardBackwardRequest"]``; map entries are not listed."""
DTYPES = {1: "<f4", 2: "<i8", 3: "<i4"}
"""Number of ``DType`` to numpy's little-endian name. Bfloat16 does not occur in requests."""
FLOAT32 = 1
INT64 = 2
STOP_REASONS = {"stop": 0, "length": 1}
