"""Remembering what was done lately, so that asking for it again is `done` and not done twice."""

from __future__ import annotations

from collections.abc import Hashable


class Recent:
    """A set of the newest `limit` keys."""

    def __init__(self, limit: int = 20_000) -> None:
        self._limit = limit
        self._keys: dict[Hashable, None] = {}

    def add(self, key: Hashable) -> None:
        """Remember a key, at the cost of the oldest when the set is full."""
        self._keys.pop(key, None)
        self._keys[key] = None
        if len(self._keys) > self._limit:
            del self._keys[next(iter(self._keys))]

    def discard(self, key: Hashable) -> None:
        """Forget a key."""
        self._keys.pop(key, None)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._keys

    def __bool__(self) -> bool:
        return bool(self._keys)
