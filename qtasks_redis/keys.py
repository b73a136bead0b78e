"""Arguments of the scripts: the keys of queues and records, and times in milliseconds."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Final

from qtasks_core import Task
from qtasks_core.records import FINAL
from qtasks_redis.connection import Connection
from qtasks_redis.records import class_of, head_of, keep_of, pair_of, score_of

RECORD: Final = "record"
INDEX: Final = "index"
PAIRS: Final = "pairs"
STREAM: Final = "items"
STREAMS: Final = "streams"
INBOX: Final = "inbox"
WATCH: Final = "final"
"""Kinds of keys. The last two name channels: of an inbox's address, and of a watched task."""
USUAL: Final = 5
"""The priority of most messages. The keys of their level have no number."""
_OF_LEVEL: Final = ("stream", "cursor", "leases")
_OF_QUEUE: Final = ("delayed", "bell", "levels")


class Keys:
    """The keys that one script call uses. The script knows them by their positions."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._positions: dict[tuple[str, int] | tuple[str, str, str], str] = {}
        self.keys: list[str] = []

    def queue(self, name: str, priority: int = USUAL) -> str:
        """Return the position of a queue's messages of one priority. Adds their keys if needed."""
        position = self._positions.get((name, priority))
        if position is None:
            position = self._positions[name, priority] = str(len(self.keys) + 1)
            key = self._connection.key
            level = name if priority == USUAL else f"{name}:{priority}"
            self.keys += (key(kind, level) for kind in _OF_LEVEL)
            self.keys += (key(kind, name) for kind in _OF_QUEUE)
        return position

    def group(self, queue: str, task_name: str, kind: str) -> str:
        """Return the position of a group of records. Adds its key if needed."""
        position = self._positions.get((queue, task_name, kind))
        if position is None:
            position = self._positions[queue, task_name, kind] = str(len(self.keys) + 1)
            self.keys.append(group_key(self._connection, queue, task_name, kind))
        return position

    def one(self, kind: str, name: str = "") -> str:
        """Add a key, and return its position."""
        self.keys.append(self._connection.key(kind, name))
        return str(len(self.keys))


class RecordKeys(Keys):
    """The keys and arguments of a script that saves records: see `record_scripts`."""

    def __init__(self, connection: Connection, uuids: Iterable[str], retention: float) -> None:
        super().__init__(connection)
        record, inbox = connection.key(RECORD, ""), connection.key(INBOX, "")
        self.keys = [connection.key(PAIRS, ""), *(record + uuid for uuid in uuids)]
        self.args: list[str | bytes] = [str(len(record) + 1), connection.key(WATCH, "")]
        self._inbox = inbox
        self._retention = retention

    def save(self, task: Task, data: bytes) -> None:
        """Add the arguments of one record, in the order of the uuids."""
        head = head_of(task)
        keep = inbox = ""
        if task.status in FINAL:
            keep = keep_of(task, self._retention)
            if task.reply_to:
                inbox = self._inbox + task.reply_to
        self.args += (
            self.group(task.queue, task.task_name, class_of(task)),
            score_of(task),
            str(len(head)),
            head + data,
            keep,
            inbox,
        )


def group_key(connection: Connection, queue: str, task_name: str, kind: str) -> str:
    """Return the key of a group of records."""
    return f"{connection.key(INDEX, pair_of(queue, task_name))}:{kind}"


def milliseconds(seconds: float) -> str:
    """Return a duration in whole milliseconds, rounded up."""
    return str(math.ceil(seconds * 1000)) if seconds > 0 else "0"
