"""The least recently used leaves, unless somebody uses it."""

from __future__ import annotations

import pytest

from framework.service.slots import Slots


def test_the_least_recently_used_without_users_is_the_victim() -> None:
    slots: Slots[str] = Slots(capacity=3)
    for name in "abc":
        slots.touch(name)
    slots.touch("a")
    assert slots.full
    assert slots.victim() == "b"
    slots.use("b")
    assert slots.victim() == "a" if slots.users["c"] else slots.victim() == "c"
    assert slots.victim(keep=frozenset({"c"})) == "a"
    slots.release("b")
    assert "b" not in slots.users


def test_everything_in_use_has_no_victim_and_no_room() -> None:
    slots: Slots[int] = Slots(capacity=1)
    slots.use(1)
    assert slots.victim() is None
    with pytest.raises(AssertionError, match="room must be made"):
        slots.touch(2)
    slots.release(1)
    slots.drop(1)
    slots.touch(2)
    assert 2 in slots
    assert 1 not in slots
