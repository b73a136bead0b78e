"""Remembering what was settled lately, so that settling it again is `done` and not `lost`."""

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

    def __contains__(self, key: Hashable) -> bool:
        return key in self._keys
