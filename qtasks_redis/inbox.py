"""An inbox on Redis: a connection that subscribes to the awaited records."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final

from uuid_utils import uuid7

from qtasks_core import Inbox, Task
from qtasks_core.errors import Closed, Unavailable, WireError
from qtasks_core.receivers import Awaited
from qtasks_core.wire import decode_task
from qtasks_redis.connection import Connection, ended
from qtasks_redis.keys import INBOX, WATCH, WATCHED, milliseconds
from qtasks_redis.record_scripts import WATCH as WATCH_SCRIPT

if TYPE_CHECKING:
    from redis.asyncio.connection import AbstractConnection

_PING_AFTER: Final = 2.0
"""Seconds of silence after which the inbox sends a PING, while it waits for results."""
_PONG_WITHIN: Final = 2.5
_WATCHED_FOR: Final = 30.0
"""Seconds for which savers push the records of watched tasks after the last inbox has asked."""
_ASK_AGAIN_AFTER: Final = 10.0
_MOST_TO_UNWATCH: Final = 64
_NAMED: Final = b"="
"""The start of a push that names a record by its key instead of containing it."""


class RedisInbox(Inbox):
    """One connection that is subscribed to an address and to each watched task.

    Its reader keeps the awaited records. While any record is awaited, the reader sends a PING to a
    silent server. The reader finishes when the connection breaks. The next `receive` raises the
    error, and the one after it opens a new connection.
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
        self._awaited = Awaited()
        self._confirming: dict[str, asyncio.Future[bool]] = {}
        """Per channel: True once the server confirms it, False if the connection breaks first."""
        self._bell = asyncio.Event()
        self._line: AbstractConnection | None = None
        self._reader: asyncio.Task[None] | None = None
        self._silence: asyncio.Timeout | None = None
        """The reader's timer. It is set only while a record is awaited."""
        self._watching: set[asyncio.Task[None]] = set()
        self._asked = -math.inf
        """When this inbox last asked for pushes, by the loop's clock."""

    async def open(self) -> None:
        """Connect, subscribe, and read the awaited records. Raises `Unavailable`."""
        connection = self._connection
        line = await connection.line()
        self._line = line
        self._reader = asyncio.create_task(self._read(line))
        self._reader.add_done_callback(lambda _: self._bell.set())
        try:
            if not self._open:
                raise Closed("the inbox is closed")
            self._awaited.to_unwatch.clear()
            await self._subscribe(
                [
                    connection.key(INBOX, self._address),
                    *(connection.key(WATCH, uuid) for uuid in self._awaited.watched),
                ]
            )
            if self._awaited.watched:
                await self._ask_for_pushes()
            self._take(await self._get(list(self._awaited.uuids)))
        except BaseException:
            await self._hang_up()
            raise

    async def _subscribe(self, channels: Sequence[str]) -> None:
        """Subscribe, and wait until the server has confirmed each channel."""
        line = self._line
        if line is None:
            raise Unavailable("the inbox has lost its connection")
        if not channels:
            return
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

    @property
    def address(self) -> str:
        return self._address

    def expect(self, uuids: Iterable[str]) -> None:
        self._awaited.expect(uuids)
        self._mind_silence()

    async def watch(self, uuids: Sequence[str]) -> None:
        new = self._awaited.watch(uuids)
        self._mind_silence()
        if self._reader is None or self._reader.done():
            raise Unavailable("the inbox has lost its connection")
        # A cancelled call goes on in the background. Giving it up would break the connection, for
        # the sake of what it has not read, and other calls would fail.
        watching = asyncio.create_task(self._watch(new, uuids))
        self._watching.add(watching)
        watching.add_done_callback(self._watched)
        await asyncio.shield(watching)

    def _watched(self, watching: asyncio.Task[None]) -> None:
        self._watching.discard(watching)
        if not watching.cancelled():
            watching.exception()  # its caller may have been cancelled

    async def _watch(self, new: Iterable[str], uuids: Sequence[str]) -> None:
        """Subscribe to the channels of new tasks, and read the records of all."""
        line = self._line
        try:
            await self._subscribe([self._connection.key(WATCH, uuid) for uuid in new])
            if asyncio.get_running_loop().time() > self._asked + _ASK_AGAIN_AFTER:
                await self._ask_for_pushes()
            self._take(await self._get(list(uuids)))
        except BaseException:
            # Unread records are read after the next reconnect, so force one.
            if line is not None:
                await line.disconnect(nowait=True)
            raise

    async def _ask_for_pushes(self) -> bool:
        """Have savers push the records of watched tasks. Return whether they may not have done so.

        Most programs watch no task, so a saver pushes only while an inbox has asked for it.
        """
        now = asyncio.get_running_loop().time()
        key = self._connection.key(WATCHED, "")
        there = await self._connection.run(WATCH_SCRIPT, [key], [milliseconds(_WATCHED_FOR)])
        before, self._asked = self._asked, now
        return not there or now - before >= _WATCHED_FOR

    def forget(self, uuids: Iterable[str]) -> None:
        self._awaited.forget(uuids)

    async def receive(self) -> list[Task]:
        while self._open:
            if arrived := self._awaited.take():
                return arrived
            self._bell.clear()
            if self._reader is None:
                await self.open()
            elif self._reader.done():
                reader, self._reader = self._reader, None
                reader.result()
            else:
                await self._bell.wait()
        raise Closed("the inbox is closed")

    async def close(self) -> None:
        self._open = False
        self._bell.set()
        await self._hang_up()
        if self._watching:
            await asyncio.wait(self._watching)

    async def _hang_up(self) -> None:
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.cancel()
            await ended(reader)

    async def _read(self, line: AbstractConnection) -> None:
        """Read until the connection breaks. `receive` raises the error."""
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
        loop = asyncio.get_running_loop()
        while True:
            patience = None
            if self._awaited.uuids:
                patience = _PONG_WITHIN if asked else _PING_AFTER
            is_due = self._awaited.watched and loop.time() > self._asked + _ASK_AGAIN_AFTER
            if is_due and await self._ask_for_pushes():
                self._take(await self._get(list(self._awaited.watched)))
            try:
                async with asyncio.timeout(patience) as self._silence:
                    reply = await line.read_response(timeout=math.inf, disconnect_on_error=False)
            except TimeoutError:
                if asked:
                    raise Unavailable("the inbox's server does not answer PING") from None
                if self._awaited.uuids:
                    with self._connection.reachable():
                        await line.send_command("PING")
                    asked = True
                continue
            except Exception as error:  # noqa: BLE001  # translated
                self._connection.raise_ours(error)
            finally:
                self._silence = None
            asked = False
            await self._hear(reply)
            if len(self._awaited.to_unwatch) >= _MOST_TO_UNWATCH:
                channels = [self._connection.key(WATCH, uuid) for uuid in self._awaited.to_unwatch]
                self._awaited.to_unwatch.clear()
                with self._connection.reachable():
                    await line.send_command("UNSUBSCRIBE", *channels)

    async def _hear(self, reply: Any) -> None:
        kind = reply[0]
        if kind == b"message":
            bodies = list(_bodies(reply[2]))
            try:
                self._take([decode_task(body) for body in bodies if body[:1] != _NAMED])
            except WireError:
                # The uuid of the record is unreadable too, so read all awaited records with `get`.
                self._take(await self._get(list(self._awaited.uuids)))
            named = [self._connection.name_in(body[1:]) for body in bodies if body[:1] == _NAMED]
            wanted = [uuid for uuid in named if uuid in self._awaited.uuids]
            if wanted:
                self._take(await self._get(wanted))
        elif kind == b"subscribe":
            future = self._confirming.get(reply[1].decode())
            if future is not None and not future.done():
                future.set_result(True)

    def _take(self, tasks: Sequence[Task | None]) -> None:
        """Keep the awaited records. A channel is useless once its record has arrived."""
        self._awaited.to_unwatch.update(self._awaited.arrive(tasks))
        self._bell.set()

    def _mind_silence(self) -> None:
        """Start the reader's timer, now that a record is awaited."""
        if self._awaited.uuids and self._silence is not None and self._silence.when() is None:
            self._silence.reschedule(asyncio.get_running_loop().time() + _PING_AFTER)


def _bodies(data: bytes) -> Iterable[bytes]:
    """Split one push into its records."""
    at = 0
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        yield data[at + 4 : at + 4 + size]
        at += 4 + size
