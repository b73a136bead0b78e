"""Remembering what was done lately, so that asking for it again is `done` and not done twice."""

from __future__ import annotations

from collections.abc import Hashable

from qtasks_core.schemas import Retry, Settlement


class Recent:
    """A set of the newest `limit` keys at the least, and of twice as many at the most."""

    def __init__(self, limit: int = 20_000) -> None:
        self._limit = limit
        # Two generations: dropping the oldest key of one dict alone would look for it, each time,
        # past the places of all that were dropped before.
        self._young: set[Hashable] = set()
        self._old: set[Hashable] = set()

    def add(self, key: Hashable) -> None:
        """Remember a key; what is older than `limit` others may be forgotten."""
        self._young.add(key)
        if len(self._young) >= self._limit:
            self._old, self._young = self._young, set()

    def discard(self, key: Hashable) -> None:
        """Forget a key."""
        self._young.discard(key)
        self._old.discard(key)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._young or key in self._old

    def __bool__(self) -> bool:
        return bool(self._young or self._old)


def repeat_key(settlement: Settlement) -> Hashable:
    """Return what a settlement has in common with its repeats, and with no others."""
    return settlement.delivery.fence, effect_of(settlement)


def effect_of(settlement: Settlement) -> Hashable:
    """Return what tells a settlement from others of its delivery.

    What was acknowledged must not be said to be retried.
    """
    if isinstance(settlement, Retry):
        message = settlement.message
        return message.uuid, message.attempt, message.queue
    return type(settlement)
