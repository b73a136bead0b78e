"""A storage on Redis: a key a record, judged in Lua; final records are pushed from the script."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakSet

from uuid_utils import uuid7

from qtasks_core import Guarantees, Inbox, Outcome, Storage, Task
from qtasks_core.batches import split
from qtasks_core.errors import Closed, Unavailable, WireError, refuse_transaction
from qtasks_core.options import checked_retention
from qtasks_core.records import FINAL, RETENTION, order_of, refused_by, unreadable
from qtasks_core.wire import decode_task, encode_task
from qtasks_redis.connection import (
    MOST_BYTES,
    MOST_ITEMS,
    UNKNOWN,
    Connection,
    connect,
    ended,
    fitting,
)
from qtasks_redis.options import checked
from qtasks_redis.scripts import SAVE

if TYPE_CHECKING:
    from redis.asyncio.connection import AbstractConnection

_RECORD: Final = "record"
_INBOX: Final = "inbox"
_WATCH: Final = "final"
_MOST_READ: Final = 500
_TRIALS: Final[Sequence[tuple[Any, ...]]] = (
    ("SET", "", "PX", 1000), ("GET",), ("MGET",), ("GETRANGE", 0, 0), ("PTTL",), ("PERSIST",),
)  # fmt: skip
"""All that the script and `get` call on keys."""
_PING_AFTER: Final = 2.0
"""Seconds of silence after which a server that owes results is asked whether it is there."""
_PONG_WITHIN: Final = 2.5
_MOST_DROPPED: Final = 64
_NAMED: Final = b"="
"""What a push begins with that names a record by its key instead of holding it."""


class RedisStorage(Storage):
    """Remembers tasks in Redis.

    `retention` is how long, in seconds, a final record without a time of its own is kept; None:
    for ever. Records that are not final stay. Raises `ConfigurationError` for a wrong URL.
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
            await self._connection.check_rights(_TRIALS, (key(_INBOX, ""), key(_WATCH, "")))
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        for inbox in list(self._inboxes):
            await inbox.close()
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()

    async def save(self, tasks: Sequence[Task], transaction: object | None = None) -> list[Outcome]:
        refuse_transaction(self, transaction)
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
        """Return what the script takes for one record."""
        head = _head(task)
        if task.status not in FINAL:
            return (str(len(head)), head + data, "", "", "")
        kept = self._retention if task.retention is None else task.retention
        keep = "" if math.isinf(kept) else str(max(1, math.ceil(kept * 1000)))
        inbox = connection.key(_INBOX, task.reply_to) if task.reply_to else ""
        return (str(len(head)), head + data, keep, inbox, connection.key(_WATCH, task.uuid))

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


class RedisInbox(Inbox):
    """One connection that is subscribed to an address and to each watched task.

    Its reader keeps what is waited for, asks a silent server for a sign of life while anything
    is, and ends with the connection; the next `receive` tells, the one after opens a new one.
    """

    def __init__(
        self,
        connection: Connection,
        get: Callable[[Sequence[str]], Awaitable[list[Task | None]]],
    ) -> None:
        self._connection = connection
        self._get = get
        self._address = str(uuid7())
        self._open = True
        self._waiting: dict[str, bool] = {}
        """The uuids that are waited for, and whether they are watched."""
        self._dropped: set[str] = set()
        """Channels that are subscribed to and no longer needed."""
        self._confirming: dict[str, asyncio.Future[bool]] = {}
        """For each channel whether the server has confirmed it, False when the line broke first."""
        self._arrived: list[Task] = []
        self._news = asyncio.Event()
        self._line: AbstractConnection | None = None
        self._reader: asyncio.Task[None] | None = None
        self._silence: asyncio.Timeout | None = None
        """The reader's timer, set only while something is waited for."""

    @property
    def address(self) -> str:
        return self._address

    def expect(self, uuids: Iterable[str]) -> None:
        for uuid in uuids:
            self._waiting.setdefault(uuid, False)
        self._mind_silence()

    async def watch(self, uuids: Sequence[str]) -> None:
        new = [uuid for uuid in dict.fromkeys(uuids) if not self._waiting.get(uuid)]
        self._waiting.update(dict.fromkeys(new, True))
        self._mind_silence()
        if self._reader is None or self._reader.done():
            raise Unavailable("the inbox has lost its connection")
        line = self._line
        try:
            await self._subscribe([self._connection.key(_WATCH, uuid) for uuid in new])
            self._take(await self._get(list(uuids)))
        except BaseException:
            # What has not been read yet is read after the next reconnect, so bring that about.
            if line is not None:
                await line.disconnect(nowait=True)
            raise

    def forget(self, uuids: Iterable[str]) -> None:
        for uuid in uuids:
            if self._waiting.pop(uuid, False):
                self._dropped.add(self._connection.key(_WATCH, uuid))

    async def receive(self) -> list[Task]:
        while self._open:
            if self._arrived:
                arrived, self._arrived = self._arrived, []
                return arrived
            self._news.clear()
            if self._reader is None:
                await self.open()
            elif self._reader.done():
                reader, self._reader = self._reader, None
                reader.result()
            else:
                await self._news.wait()
        raise Closed("the inbox is closed")

    async def close(self) -> None:
        self._open = False
        self._news.set()
        await self._hang_up()

    async def open(self) -> None:
        """Connect, subscribe, and read what is waited for. Raises `Unavailable`."""
        connection = self._connection
        line = await connection.line()
        self._line = line
        self._reader = asyncio.create_task(self._read(line))
        self._reader.add_done_callback(lambda _: self._news.set())
        try:
            if not self._open:
                raise Closed("the inbox is closed")
            watched = [uuid for uuid, is_watched in self._waiting.items() if is_watched]
            self._dropped.clear()
            await self._subscribe(
                [
                    connection.key(_INBOX, self._address),
                    *(connection.key(_WATCH, uuid) for uuid in watched),
                ]
            )
            self._take(await self._get(list(self._waiting)))
        except BaseException:
            await self._hang_up()
            raise

    async def _hang_up(self) -> None:
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.cancel()
            await ended(reader)

    async def _subscribe(self, channels: Sequence[str]) -> None:
        """Subscribe and wait until the server has confirmed each channel."""
        line = self._line
        if line is None:
            raise Unavailable("the inbox has lost its connection")
        if not channels:
            return
        self._dropped.difference_update(channels)
        loop = asyncio.get_running_loop()
        confirmed = [
            self._confirming.setdefault(channel, loop.create_future()) for channel in channels
        ]
        try:
            with self._connection.reachable():
                async with asyncio.timeout(self._connection.answer_within):
                    await line.send_command("SUBSCRIBE", *channels)
                    await asyncio.wait(confirmed)
        finally:
            for channel in channels:
                self._confirming.pop(channel, None)
        if not all(future.result() for future in confirmed):
            raise Unavailable("the inbox has lost its connection")

    async def _read(self, line: AbstractConnection) -> None:
        """Read until the connection breaks; the error is for `receive` to raise."""
        try:
            await self._follow(line)
        finally:
            self._line = None
            for future in self._confirming.values():
                if not future.done():
                    future.set_result(False)
            await line.disconnect(nowait=True)

    async def _follow(self, line: AbstractConnection) -> None:
        asked = False
        while True:
            patience = _PONG_WITHIN if asked else _PING_AFTER
            try:
                async with asyncio.timeout(patience if self._waiting else None) as self._silence:
                    reply = await line.read_response(timeout=math.inf, disconnect_on_error=False)
            except TimeoutError:
                if asked:
                    raise Unavailable("the inbox's server does not answer PING") from None
                if self._waiting:
                    with self._connection.reachable():
                        await line.send_command("PING")
                    asked = True
                continue
            except Exception as error:  # noqa: BLE001  # raised as ours
                self._connection.raise_ours(error)
            finally:
                self._silence = None
            asked = False
            await self._hear(reply)
            if len(self._dropped) >= _MOST_DROPPED:
                dropped, self._dropped = self._dropped, set()
                with self._connection.reachable():
                    await line.send_command("UNSUBSCRIBE", *dropped)

    async def _hear(self, reply: Any) -> None:
        kind = reply[0]
        if kind == b"message":
            bodies = list(_bodies(reply[2]))
            try:
                self._take([decode_task(body) for body in bodies if body[:1] != _NAMED])
            except WireError:
                # Whose it is cannot be read either; `get` knows what it asks for.
                self._take(await self._get(list(self._waiting)))
            named = [self._connection.name_in(body[1:]) for body in bodies if body[:1] == _NAMED]
            wanted = [uuid for uuid in named if uuid in self._waiting]
            if wanted:
                self._take(await self._get(wanted))
        elif kind == b"subscribe":
            future = self._confirming.get(reply[1].decode())
            if future is not None and not future.done():
                future.set_result(True)

    def _take(self, tasks: Sequence[Task | None]) -> None:
        """Keep the final records that are waited for, each once."""
        for task in tasks:
            if task is None or task.status not in FINAL or task.uuid not in self._waiting:
                continue
            self.forget([task.uuid])
            self._arrived.append(task)
            self._news.set()

    def _mind_silence(self) -> None:
        """Have the reader look at the clock now that something is waited for."""
        if self._waiting and self._silence is not None and self._silence.when() is None:
            self._silence.reschedule(asyncio.get_running_loop().time() + _PING_AFTER)


def _head(task: Task) -> bytes:
    """Return what the script compares: the order, and the execution with its length."""
    execution = task.execution.encode()
    return b"%010d%03d%b" % (order_of(task), len(execution), execution)


def _decode(uuid: str, value: bytes) -> Task:
    """Return the record behind its head, or what the head tells of one that cannot be read."""
    behind = 13 + int(value[10:13])
    try:
        return decode_task(value[behind:])
    except WireError as error:
        execution = value[13:behind].decode(errors="replace")
        return unreadable(uuid, int(value[:10]), execution, error)


def _bodies(data: bytes) -> Iterable[bytes]:
    """Split what was pushed at once into its records."""
    at = 0
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        yield data[at + 4 : at + 4 + size]
        at += 4 + size
