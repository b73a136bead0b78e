"""A storage on Redis: one key per record; a script decides on saves and pushes final records."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final
from weakref import WeakSet

from qtasks_core import Guarantees, Inbox, Outcome, Storage, Task
from qtasks_core.batches import split
from qtasks_core.errors import (
    Closed,
    WireError,
)
from qtasks_core.options import checked_retention
from qtasks_core.records import FINAL, RETENTION, order_of, refused_by, unreadable
from qtasks_core.together import together
from qtasks_core.transactions import refuse_transaction
from qtasks_core.wire import decode_task, encode_task
from qtasks_redis.connection import (
    MOST_BYTES,
    MOST_ITEMS,
    UNKNOWN,
    Connection,
    connect,
    fitting,
)
from qtasks_redis.inbox import INBOX, WATCH, RedisInbox
from qtasks_redis.options import checked
from qtasks_redis.scripts import SAVE

_RECORD: Final = "record"
_MOST_READ: Final = 500
_TRIALS: Final[Sequence[tuple[Any, ...]]] = (
    ("SET", "", "PX", 1000), ("GET",), ("MGET",), ("GETRANGE", 0, 0), ("PTTL",), ("PERSIST",),
)  # fmt: skip
"""All commands that the script and `get` call on keys."""


class RedisStorage(Storage):
    """Keeps records in Redis.

    `retention` is in seconds. It applies to final records without their own retention; None keeps
    them for ever. Records that are not final stay. Raises `ConfigurationError` if the URL is wrong.
    """

    driver_loggers = ("redis", "push_response")

    def __init__(
        self, url: str = "redis://localhost", *, retention: float | None = RETENTION
    ) -> None:
        self._retention = checked_retention(retention)
        self._url = checked(url)
        self._connection: Connection | None = None
        self._server = UNKNOWN
        self._inboxes: WeakSet[RedisInbox] = WeakSet()

    @property
    def guarantees(self) -> Guarantees:
        return Guarantees(
            part="RedisStorage",
            server=self._server.name,
            survives=self._server.survives,
            durability=self._server.durability,
            retention=self._retention,
            largest=self._server.largest,
            unsupported=(
                "query", "claim", "release", "set", "get_value", "values", "watch_value",
                "append", "read", "delete", "expire", "migrate",
            ),
            notes=self._server.notes,
        )  # fmt: skip

    async def start(self, namespace: str) -> None:
        self._connection = await connect(self._url, namespace)
        self._server = self._connection.server
        key = self._connection.key
        try:
            await self._connection.check_rights(_TRIALS, (key(INBOX, ""), key(WATCH, "")))
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        try:
            await together([inbox.close() for inbox in self._inboxes])
        finally:
            connection, self._connection = self._connection, None
            if connection is not None:
                await connection.close()

    async def save(self, tasks: Sequence[Task], transaction: object | None = None) -> list[Outcome]:
        if transaction is not None:
            refuse_transaction(self)
        connection = self._started()
        encoded = [encode_task(task) for task in tasks]
        outcomes, taken = fitting(encoded, connection.server.largest)
        for part in split([len(encoded[at]) for at in taken], MOST_ITEMS, MOST_BYTES):
            keys = [connection.key(_RECORD, tasks[at].uuid) for at in taken[part]]
            args: list[str | bytes] = []
            for at in taken[part]:
                args += self._record(connection, tasks[at], encoded[at])
            answers = await connection.run(SAVE, keys, args)
            for at, answer in zip(taken[part], answers, strict=True):
                if answer != 1:
                    outcomes[at] = refused_by(_decode(tasks[at].uuid, answer))
        return outcomes

    def _record(self, connection: Connection, task: Task, data: bytes) -> tuple[str | bytes, ...]:
        """Return the arguments of the script for one record."""
        head = _head(task)
        if task.status not in FINAL:
            return (str(len(head)), head + data, "", "", "")
        kept = self._retention if task.retention is None else task.retention
        keep = "" if math.isinf(kept) else str(max(1, math.ceil(kept * 1000)))
        inbox = connection.key(INBOX, task.reply_to) if task.reply_to else ""
        return (str(len(head)), head + data, keep, inbox, connection.key(WATCH, task.uuid))

    async def get(self, uuids: Sequence[str]) -> list[Task | None]:
        connection = self._started()
        found: list[Task | None] = []
        for start in range(0, len(uuids), _MOST_READ):
            part = uuids[start : start + _MOST_READ]
            values = await connection.read([connection.key(_RECORD, uuid) for uuid in part])
            found += (
                None if value is None else _decode(uuid, value)
                for uuid, value in zip(part, values, strict=True)
            )
        return found

    async def inbox(self) -> Inbox:
        inbox = RedisInbox(self._started(), self.get)
        await inbox.open()
        self._inboxes.add(inbox)
        return inbox

    async def clock(self) -> float | None:
        return await self._started().time()

    def _started(self) -> Connection:
        if self._connection is None:
            raise Closed("RedisStorage is not started")
        return self._connection


def _head(task: Task) -> bytes:
    """Return the head that the script compares: the order, and the execution with its length."""
    execution = task.execution.encode()
    return b"%010d%03d%b" % (order_of(task), len(execution), execution)


def _decode(uuid: str, value: bytes) -> Task:
    """Return the record after its head. If it is unreadable, return what the head tells."""
    behind = 13 + int(value[10:13])
    try:
        return decode_task(value[behind:])
    except WireError as error:
        execution = value[13:behind].decode(errors="replace")
        return unreadable(uuid, int(value[:10]), execution, error)
