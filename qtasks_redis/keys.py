"""Arguments of the scripts: the keys of queues and records, and times in milliseconds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import msgspec

from qtasks_core import Task
from qtasks_core.records import FINAL, RANK
from qtasks_redis.connection import Connection
from qtasks_redis.records import class_of, head_of, keep_of, pair_of, score_of

RECORD: Final = "record"
INDEX: Final = "index"
PAIRS: Final = "pairs"
STREAM: Final = "items"
STREAMS: Final = "streams"
INBOX: Final = "inbox"
WATCH: Final = "final"
WATCHED: Final = "watched"
"""Kinds of keys. `INBOX` and `WATCH` name channels: of an inbox, and of a watched task."""
USUAL: Final = 5
"""The priority of most messages. The keys of their level have no number."""
_OF_LEVEL: Final = ("stream", "cursor", "leases")
_OF_QUEUE: Final = ("delayed", "bell", "levels")


class Keys:
    """The keys that one script call uses. The script knows them by their positions."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._positions: dict[tuple[str, int] | tuple[str, str, str], int] = {}
        self.keys: list[str] = []

    def queue(self, name: str, priority: int = USUAL) -> int:
        """Return the position of a queue's messages of one priority. Adds their keys if needed."""
        position = self._positions.get((name, priority))
        if position is None:
            position = self._positions[name, priority] = len(self.keys) + 1
            key = self._connection.key
            level = name if priority == USUAL else f"{name}:{priority}"
            self.keys += (key(kind, level) for kind in _OF_LEVEL)
            self.keys += (key(kind, name) for kind in _OF_QUEUE)
        return position

    def group(self, queue: str, task_name: str, kind: str) -> int:
        """Return the position of a group of records. Adds its key if needed."""
        position = self._positions.get((queue, task_name, kind))
        if position is None:
            position = self._positions[queue, task_name, kind] = len(self.keys) + 1
            self.keys.append(group_key(self._connection, queue, task_name, kind))
        return position

    def one(self, kind: str, name: str = "") -> None:
        """Add a key."""
        self.keys.append(self._connection.key(kind, name))


class RecordKeys(Keys):
    """The keys and arguments of a script that saves records: see `record_scripts`."""

    def __init__(self, connection: Connection, retention: float) -> None:
        super().__init__(connection)
        self.one(PAIRS)
        kinds = RECORD, WATCH, INBOX, WATCHED
        self.sent: list[str | int] = [connection.key(kind, "") for kind in kinds]
        """What is sent as one argument."""
        self.values: list[bytes] = []
        """Records and messages: the other arguments."""
        self._retention = retention

    @property
    def args(self) -> list[bytes]:
        """The arguments of the script."""
        return [packed(self.sent), *self.values]

    def save(self, task: Task, data: bytes) -> None:
        """Add a record."""
        keep = inbox = ""
        if task.status in FINAL:
            keep = keep_of(task, self._retention)
            inbox = task.reply_to or ""
        self.sent += (
            task.uuid,
            self.group(task.queue, task.task_name, class_of(task)),
            score_of(task),
            RANK[task.status],
            keep,
            inbox,
        )
        self.values.append(head_of(task) + data)


def packed(sent: Sequence[str | int]) -> bytes:
    """Return many small arguments as one. A script unpacks them, which takes much less time."""
    return msgspec.msgpack.encode(sent)


def group_key(connection: Connection, queue: str, task_name: str, kind: str) -> str:
    """Return the key of a group of records."""
    return f"{connection.key(INDEX, pair_of(queue, task_name))}:{kind}"


def milliseconds(seconds: float) -> int:
    """Return a duration in whole milliseconds, rounded up."""
    return math.ceil(seconds * 1000) if seconds > 0 else 0
