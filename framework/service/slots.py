"""Which adapters are in the trainer and which versions are in the engine, and who makes room for whom.

Rank 0 only. An adapter that leaves the trainer goes to its snapshot folder, exactly; a version that leaves the engine
is already in its folder. Both come back the same way, so there is no adapter that "is not loaded".
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


@dataclass(slots=True, kw_only=True)
class Slots(Generic[K]):
    """A bounded set in order of last use; entries with users cannot leave."""

    capacity: int
    resident: OrderedDict[K, None] = field(default_factory=OrderedDict)
    users: Counter[K] = field(default_factory=Counter)

    def __contains__(self, key: object) -> bool:
        return key in self.resident

    def touch(self, key: K) -> None:
        """Makes it the most recently used; adds it if need be (room must have been made)."""
        self.resident[key] = None
        self.resident.move_to_end(key)
        assert len(self.resident) <= self.capacity, "room must be made before a slot is taken"

    def drop(self, key: K) -> None:
        self.resident.pop(key, None)

    def use(self, key: K) -> None:
        self.users[key] += 1
        self.touch(key)

    def release(self, key: K) -> None:
        self.users[key] -= 1
        if self.users[key] <= 0:
            del self.users[key]

    def victim(self, keep: frozenset[K] = frozenset()) -> K | None:
        """The least recently used entry that nobody uses, outside ``keep``."""
        return next((key for key in self.resident if not self.users[key] and key not in keep), None)

    @property
    def full(self) -> bool:
        return len(self.resident) >= self.capacity
