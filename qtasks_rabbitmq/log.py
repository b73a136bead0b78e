"""A log on a RabbitMQ stream: confirmed appends, reads from an offset, marks to catch up."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Sequence
from functools import partial
from hashlib import sha256
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
from uuid_utils import uuid7

from qtasks_core import Guarantees
from qtasks_core.batches import split
from qtasks_core.errors import Closed, ConfigurationError, Unavailable
from qtasks_core.receivers import Shielded
from qtasks_log import Entry, Log, Replaced
from qtasks_rabbitmq.connection import HARD_LIMIT, MOST_AT_ONCE, MOST_BYTES_AT_ONCE, Connection
from qtasks_rabbitmq.servers import HEARTBEAT, servers_of
from qtasks_rabbitmq.topology import NOT_FOUND, Names, declare

if TYPE_CHECKING:
    from qtasks_rabbitmq.channel import Arrival, Channel

PREFETCH = 2000
VERSION = b"\x01"
"""The first byte of every record. A release raises it if older ones cannot read its records."""


class Record(msgspec.Struct, frozen=True, array_like=True, omit_defaults=True, gc=False):
    """A record of the stream: an entry, or a mark if `mark` is set."""

    partition_key: str
    key: str
    value: bytes | None
    mark: str = ""


class Mark:
    """A position in the log. It is reached once the reader has passed its record."""

    __slots__ = ("id", "reached")

    def __init__(self) -> None:
        self.id = str(uuid7())
        self.reached = False


class First(NamedTuple):
    """The first record of a stream: its offset, and the SHA-256 of its body."""

    offset: int
    digest: bytes


class Position(msgspec.Struct, frozen=True, array_like=True):
    """Up to where a process has read which stream."""

    first: First | None
    next: int


logger = logging.getLogger("qtasks.rabbitmq")
_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Record)


class RabbitMQLog(Log):
    """One stream per namespace, without a limit of size or age."""

    def __init__(self, url: str = "amqp://localhost") -> None:
        servers_of(url)
        self._url = url
        self._names = Names("")
        self._stream = ""
        self._writing: Connection | None = None
        self._reading: Connection | None = None
        self._reader: Channel | None = None
        self._next = 0
        """The offset after the last returned record."""
        self._first: First | None = None
        """The first record. It differs if the stream was created again, or truncated."""
        self._replaced = False
        """Whether the reader has to forget what it has read, until it seeks."""
        self._arrived: deque[tuple[int, int, bytes]] = deque()
        self._bell = asyncio.Event()
        self._opening: Shielded[Channel] = Shielded()
        self._marks: dict[str, Mark] = {}

    @property
    def guarantees(self) -> Guarantees:
        return Guarantees(
            part="RabbitMQStorage",
            server=self._writing.server if self._writing is not None else "",
            survives="server crash",
            durability="a stream: confirmed when a majority has written it; RabbitMQ does not sync "
            "streams to disk, so one machine alone may forget the last seconds when it fails",
            largest=(self._writing and self._writing.largest) or HARD_LIMIT,
        )

    @property
    def compacts(self) -> bool:
        return False

    async def migrate(self, namespace: str) -> list[str]:
        log = RabbitMQLog(self._url)
        try:
            return await log._migrate(namespace)
        finally:
            await log.stop()

    async def _migrate(self, namespace: str) -> list[str]:
        missing = False

        async def create(channel: Channel, purpose: str, version: tuple[int, ...]) -> None:
            nonlocal missing
            missing = await self._missing(channel)
            await self._create(channel, purpose, version)

        self._names = Names(namespace)
        self._stream = self._names.log
        self._writing = Connection(self._url, "migration", HEARTBEAT, create)
        await self._writing.channel()
        await self._writing.registered()
        return [f"stream {self._stream} created"] if missing else []

    async def _missing(self, channel: Channel) -> bool:
        """Return whether the stream is still to be created."""
        from pamqp.commands import Queue

        async with channel.aside() as aside:
            try:
                await aside.call(Queue.Declare(queue=self._stream, passive=True))
            except Unavailable:
                if aside.close_code != NOT_FOUND:
                    raise
                return True
            except ConfigurationError:
                # A user who may not ask has not the right to create it either.
                return False
        return False

    async def start(self, namespace: str) -> None:
        self._names = Names(namespace)
        self._stream = self._names.log
        if self._writing is None:
            self._next, self._first, self._replaced = 0, None, False
            self._writing = Connection(self._url, "log writer", HEARTBEAT, self._create)
            self._reading = Connection(self._url, "log reader", HEARTBEAT, self._consume)
        await self._writing.channel()

    async def stop(self) -> None:
        await self._opening.abandon()
        connections = (self._writing, self._reading)
        self._writing = self._reading = self._reader = None
        for connection in connections:
            if connection is not None:
                await connection.close()
        self._bell.set()

    async def append(self, entries: Sequence[Entry]) -> list[str | None]:
        bodies = [
            VERSION + _encoder.encode(Record(entry.partition_key, entry.key, entry.value))
            for entry in entries
        ]
        answers: list[str | None] = []
        for part in split(map(len, bodies), MOST_AT_ONCE, MOST_BYTES_AT_ONCE):
            answers += await self._append(bodies[part])
        return answers

    async def read(self) -> list[Entry]:
        while True:
            self._bell.clear()
            if self._reading is None:
                raise Closed("RabbitMQLog is not started")
            if self._reader is None or self._reader.lost is not None:
                self._reader = await self._opening.run(self._reading.channel)
            if self._replaced:
                raise Replaced(f"the stream {self._stream} was created again or truncated")
            if self._arrived:
                reached, entries = await self._collect(self._reading, self._reader)
                if entries or reached:
                    return entries
            else:
                await self._bell.wait()

    @property
    def position(self) -> bytes:
        return msgspec.msgpack.encode(Position(self._first, self._next))

    async def seek(self, position: bytes | None) -> bool:
        if self._reading is None:
            raise Closed("RabbitMQLog is not started")
        at = Position(None, 0)
        if position is not None:
            at = msgspec.msgpack.decode(position, type=Position)
        await self._opening.abandon()
        self._reading.discard("seeking")
        self._next, self._first, self._replaced = at.next, at.first, False
        self._arrived.clear()
        self._reader = await self._opening.run(self._reading.channel)
        replaced, self._replaced = self._replaced, False
        return not replaced

    async def mark(self) -> object:
        """Write a mark record and return the mark, because a stream's end cannot be queried."""
        mark = Mark()
        self._marks[mark.id] = mark
        try:
            await self._append([VERSION + _encoder.encode(Record("", "", None, mark.id))])
        except BaseException:
            self._marks.pop(mark.id, None)
            raise
        return mark

    def reached(self, mark: object) -> bool:
        return isinstance(mark, Mark) and mark.reached and not self._replaced

    async def _append(self, bodies: Sequence[bytes]) -> list[str | None]:
        """Publish records. Return for each None, or why it is too large for the server."""
        from qtasks_rabbitmq.channel import Sending

        if self._writing is None:
            raise Closed("RabbitMQLog is not started")
        sendings = [Sending(body, self._stream) for body in bodies]
        refused = await self._writing.publish(sendings)
        most = self._writing.largest or HARD_LIMIT
        gone = [at for at in refused if len(bodies[at]) <= most]
        if gone:
            # The stream was deleted. Reconnecting declares it again.
            self._writing.discard("the stream is gone")
            again = await self._writing.publish([sendings[at] for at in gone])
            if again:
                self._writing.discard("the stream is gone")
                raise Unavailable(f"the stream {self._stream}: {next(iter(again.values()))}")
        return [refused.get(at) if at not in gone else None for at in range(len(bodies))]

    async def _collect(self, reading: Connection, reader: Channel) -> tuple[bool, list[Entry]]:
        """Return whether a mark of this log was reached, and the entries that have arrived."""
        from pamqp.commands import Basic

        # This asks for more. It comes before anything is taken, so a cancellation here skips
        # nothing.
        async with reading.answering():
            await reader.send(Basic.Ack(delivery_tag=self._arrived[-1][1], multiple=True))
        reached = False
        entries: list[Entry] = []
        while self._arrived:
            offset, _, body = self._arrived.popleft()
            self._next = offset + 1
            self._first = self._first or First(offset, sha256(body).digest())
            record = _decode(offset, body)
            if record is None:
                continue
            if not record.mark:
                entries.append(Entry(record.partition_key, record.key, record.value))
            elif (mark := self._marks.pop(record.mark, None)) is not None:
                mark.reached = reached = True
        return reached, entries

    async def _create(self, channel: Channel, _purpose: str, _version: tuple[int, ...]) -> None:
        """Declare the stream on a new connection."""
        from pamqp.commands import Queue

        arguments: dict[str, Any] = {"x-queue-type": "stream"}
        stream = Queue.Declare(queue=self._stream, durable=True, arguments=arguments)
        await declare(channel, self._names, [stream])

    async def _consume(self, channel: Channel, purpose: str, version: tuple[int, ...]) -> None:
        """Continue to read after the last returned record, on a new connection."""
        from pamqp.commands import Basic

        await self._create(channel, purpose, version)
        self._arrived.clear()
        if self._next and await self._read_first(channel) != self._first:
            # Old offsets mean nothing in a new stream, which may never reach them.
            self._next, self._first, self._replaced = 0, None, True
        channel.on_delivery = partial(self._arrive, channel)
        channel.on_lost = self._bell.set
        offset: dict[str, Any] = {"x-stream-offset": self._next or "first"}
        await channel.call(
            Basic.Qos(prefetch_count=PREFETCH),
            Basic.Consume(queue=self._stream, arguments=offset),
        )

    async def _read_first(self, channel: Channel) -> First:
        """Return the stream's first record."""
        from pamqp.commands import Basic, Confirm

        from qtasks_rabbitmq.channel import Sending

        found: asyncio.Future[First] = asyncio.get_running_loop().create_future()

        def arrive(arrival: Arrival) -> None:
            if not found.done():
                offset = arrival.headers.get("x-stream-offset", 0)
                found.set_result(First(offset, sha256(arrival.body).digest()))

        def lose() -> None:
            if not found.done():
                found.set_exception(Unavailable(f"the stream {self._stream} could not be read"))

        async with channel.aside() as aside:
            aside.on_delivery, aside.on_lost = arrive, lose
            # An empty stream would send nothing.
            mark = VERSION + _encoder.encode(Record("", "", None, Mark().id))
            await aside.call(Confirm.Select(), Basic.Qos(prefetch_count=1))
            await aside.publish([Sending(mark, self._stream)])
            await aside.call(
                Basic.Consume(queue=self._stream, arguments={"x-stream-offset": "first"})
            )
            return await found

    def _arrive(self, channel: Channel, arrival: Arrival) -> None:
        # Offsets are consecutive. The server's offset is missing only if a record's properties are
        # completely unreadable.
        following = self._arrived[-1][0] + 1 if self._arrived else self._next
        offset = arrival.headers.get("x-stream-offset", following)
        if channel.lost is None and offset >= self._next:
            self._arrived.append((offset, arrival.tag, arrival.body))
            self._bell.set()


def _decode(offset: int, body: bytes) -> Record | None:
    """Return the record, or None if another program or a later release wrote it."""
    if body[:1] == VERSION:
        try:
            return _decoder.decode(memoryview(body)[1:])
        except msgspec.MsgspecError as error:
            logger.error("offset %d of the log cannot be read: %s", offset, error)
            return None
    logger.error("offset %d of the log cannot be read: not written by this release", offset)
    return None
