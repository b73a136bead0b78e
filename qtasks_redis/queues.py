"""Arguments of the scripts: the keys of queues, and times in milliseconds."""

from __future__ import annotations

import math
from collections.abc import Iterable

from qtasks_redis.connection import Connection


class Queues:
    """The keys of the queues that one script call uses."""

    def __init__(self, connection: Connection, names: Iterable[str] = ()) -> None:
        self._connection = connection
        self._positions: dict[str, str] = {}
        self.keys: list[str] = []
        for name in names:
            self.position(name)

    def position(self, name: str) -> str:
        """Return the position of this queue in KEYS. Adds the queue if it is new."""
        position = self._positions.get(name)
        if position is None:
            position = self._positions[name] = str(len(self.keys) + 1)
            kinds = ("stream", "cursor", "leases", "delayed", "bell")
            self.keys += (self._connection.key(kind, name) for kind in kinds)
        return position


def milliseconds(seconds: float) -> str:
    """Return a duration in whole milliseconds, rounded up."""
    return str(math.ceil(seconds * 1000)) if seconds > 0 else "0"
