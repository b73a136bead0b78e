"""A storage on Redis: one key per record; a script decides on saves and pushes final records."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any, Final
from weakref import WeakSet

from msgspec import UNSET, UnsetType

from qtasks_core import Claim, Guarantees, Inbox, Outcome, Storage, Task, TaskPage, TaskQuery
from qtasks_core.batches import split
from qtasks_core.errors import Closed
from qtasks_core.options import checked_retention
from qtasks_core.queries import cursor_at, place_of
from qtasks_core.records import RETENTION, refused_by, retention_note
from qtasks_core.together import together
from qtasks_core.transactions import refuse_transaction
from qtasks_core.wire import encode_task
from qtasks_redis import listing, shared
from qtasks_redis.connection import (
    BEST_SETTINGS,
    MOST_BYTES,
    MOST_ITEMS,
    UNKNOWN,
    Connection,
    connect,
    fitting,
)
from qtasks_redis.inbox import RedisInbox
from qtasks_redis.keys import INBOX, RECORD, WATCH, RecordKeys
from qtasks_redis.listening import Listeners
from qtasks_redis.options import checked
from qtasks_redis.record_scripts import SAVE
from qtasks_redis.records import decode

_MOST_READ: Final = 500
TRIALS: Final[Sequence[tuple[Any, ...]]] = (
    ("SET", "", "PX", 1000), ("GET",), ("MGET",), ("GETRANGE", 0, 0), ("PTTL",), ("PERSIST",),
    ("EXISTS",), ("ZADD", "XX", 0, "m"), ("ZREM", "m"), ("ZCARD",), ("ZSCORE", "m"),
    ("ZCOUNT", 0, 0), ("ZREVRANGE", 0, 0), ("ZRANGEBYSCORE", 0, 0), ("ZRANGEBYLEX", "[", "["),
    ("SADD", "m"), ("SREM", "m"), ("SMEMBERS",), ("HSET", "f", "v"), ("HGET", "f"),
    ("HMGET", "f"), ("HDEL", "f"), ("RPUSH", "m"), ("LRANGE", 0, 0), ("DEL",),
)  # fmt: skip
"""All commands that the storage and its scripts call on keys.

The key holds text, so most of them fail. The last one deletes it.
"""


class RedisStorage(Storage):
    """Keeps records in Redis.

    `retention` is in seconds. It applies to final records without their own retention; None keeps
    them for ever. Records that are not final stay. Raises `ConfigurationError` if the URL is wrong.
    """

    driver_loggers = ("redis", "push_response")

    def __init__(
        self, url: str = "redis://localhost", *, retention: float | None = RETENTION
    ) -> None:
        self.retention = checked_retention(retention)
        self.url = checked(url)
        self._connection: Connection | None = None
        self._server = UNKNOWN
        self._inboxes: WeakSet[RedisInbox] = WeakSet()
        self._listeners = Listeners()

    @property
    def guarantees(self) -> Guarantees:
        return Guarantees(
            part="RedisStorage",
            server=self._server.name,
            survives=self._server.survives,
            durability=self._server.durability,
            at_best="machine crash",
            best_settings=BEST_SETTINGS,
            retention=self.retention,
            largest=self._server.largest,
            notes=(retention_note(self.retention),),
            advice=self._server.advice,
        )

    async def start(self, namespace: str) -> None:
        self._connection = await self._connect(namespace)
        self._server = self._connection.server

    async def refresh(self) -> None:
        connection = self.started()
        await connection.refresh()
        self._server = connection.server

    async def _connect(self, namespace: str) -> Connection:
        connection = await connect(self.url, namespace)
        try:
            channels = [connection.key(kind, "") for kind in (INBOX, WATCH)]
            await connection.check_rights(TRIALS, channels)
        except BaseException:
            await connection.close()
            raise
        return connection

    async def stop(self) -> None:
        try:
            await together([inbox.close() for inbox in self._inboxes])
        finally:
            await self._listeners.stop()
            connection, self._connection = self._connection, None
            if connection is not None:
                await connection.close()

    async def save(self, tasks: Sequence[Task], transaction: object | None = None) -> list[Outcome]:
        if transaction is not None:
            refuse_transaction(self)
        connection = self.started()
        encoded = [encode_task(task) for task in tasks]
        outcomes, taken = fitting(encoded, connection.server.largest)
        sizes = [len(encoded[at]) for at in taken]
        for part in parts([tasks[at].uuid for at in taken], sizes):
            places = [taken[place] for place in part]
            keys = RecordKeys(connection, self.retention)
            for at in places:
                keys.save(tasks[at], encoded[at])
            answers = await connection.run(SAVE, keys.keys, keys.args)
            for at, answer in zip(places, answers, strict=True):
                if answer != 1:
                    outcomes[at] = refused_by(decode(tasks[at].uuid, answer))
        return outcomes

    async def get(self, uuids: Sequence[str]) -> list[Task | None]:
        connection = self.started()
        found: list[Task | None] = []
        for start in range(0, len(uuids), _MOST_READ):
            part = uuids[start : start + _MOST_READ]
            values = await connection.read([connection.key(RECORD, uuid) for uuid in part])
            found += (
                None if value is None else decode(uuid, value)
                for uuid, value in zip(part, values, strict=True)
            )
        return found

    async def inbox(self) -> Inbox:
        inbox = RedisInbox(self.started(), self.get)
        await inbox.open()
        self._inboxes.add(inbox)
        return inbox

    async def clock(self) -> float | None:
        return await self.started().time()

    async def query(self, query: TaskQuery) -> TaskPage:
        connection = self.started()
        tasks: list[Task] = []
        last = None if query.cursor is None else place_of(query.cursor)
        more = True
        while more and len(tasks) <= query.limit:
            # One more than the page has: it tells whether there is another page.
            missing = query.limit + 1 - len(tasks)
            some, last, more = await listing.look(connection, query, last, missing)
            tasks += some
        shown = tasks[: query.limit]
        following = len(tasks) > len(shown)
        return TaskPage(
            shown, cursor_at((shown[-1].created_at, shown[-1].uuid)) if following else None
        )

    async def claim(self, key: str, owner: str, ttl: float) -> Claim | None:
        return await shared.claim(self.started(), key, owner, ttl)

    async def release(self, claim: Claim) -> None:
        await shared.release(self.started(), claim)

    async def set(
        self, key: str, value: bytes | None, expect: bytes | UnsetType | None = UNSET
    ) -> bool:
        return await shared.set_value(self.started(), key, value, expect)

    async def get_value(self, key: str) -> bytes | None:
        return await shared.get_value(self.started(), key)

    async def values(self, prefix: str) -> dict[str, bytes]:
        return await shared.values(self.started(), prefix)

    def watch_value(self, key: str) -> AsyncIterator[bytes | None]:
        return shared.watch_value(self.started(), self._listeners, key)

    async def append(self, uuid: str, items: Sequence[bytes]) -> None:
        await shared.append(self.started(), uuid, items)

    async def read(self, uuid: str, after: int) -> list[tuple[int, bytes]]:
        return await shared.read(self.started(), uuid, after)

    async def delete(self, uuids: Sequence[str]) -> int:
        return await listing.delete(self.started(), uuids)

    async def expire(self) -> int:
        connection = self.started()
        count = await listing.expire(connection)
        if math.isfinite(self.retention):
            await listing.tidy(connection, self.retention)
        return count

    async def migrate(self, namespace: str) -> list[str]:
        """Check the server and the user's rights. There is nothing to create."""
        await (await self._connect(namespace)).close()
        return []

    def started(self) -> Connection:
        """Return the connection. Raises `Closed`."""
        if self._connection is None:
            raise Closed("RedisStorage is not started")
        return self._connection


def parts(uuids: Sequence[str], sizes: Sequence[int]) -> Iterator[range]:
    """Split the places of records into those of each script call. No uuid comes twice in one."""
    most = MOST_ITEMS if len(set(uuids)) == len(uuids) else 1
    for part in split(sizes, most, MOST_BYTES):
        yield range(len(uuids))[part]
