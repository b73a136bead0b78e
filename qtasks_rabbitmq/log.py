"""A log on RabbitMQ streams: confirmed appends, reads from an offset, marks to catch up."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Sequence
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec
from uuid_utils import uuid7

from qtasks_core import Guarantees
from qtasks_core.batches import split
from qtasks_core.errors import Closed, Unavailable
from qtasks_core.receivers import Shielded
from qtasks_log import Entry, Living, Replaced, Rewritable
from qtasks_rabbitmq.connection import HARD_LIMIT, MOST_AT_ONCE, MOST_BYTES_AT_ONCE, Connection
from qtasks_rabbitmq.generations import (
    PREFETCH,
    Generation,
    Generations,
    Turn,
    new_name,
    number_of,
    records,
    there,
)
from qtasks_rabbitmq.servers import HEARTBEAT, servers_of
from qtasks_rabbitmq.topology import Names, once_created

if TYPE_CHECKING:
    from qtasks_rabbitmq.channel import Arrival, Channel

STALLED = 10.0
"""Seconds without any record after which copying a log gives up."""
VERSION = b"\x01"
"""The first byte of every record. A release raises it if older ones cannot read its records."""


class Record(msgspec.Struct, frozen=True, array_like=True, omit_defaults=True, gc=False):
    """A record of a stream: an entry, a mark if `mark` is set, or a turn."""

    partition_key: str = ""
    key: str = ""
    value: bytes | None = None
    mark: str = ""
    turn: Turn | None = None


class Mark:
    """A position in the log. It is reached once the reader has passed its record."""

    __slots__ = ("id", "reached")

    def __init__(self) -> None:
        self.id = str(uuid7())
        self.reached = False


class Position(msgspec.Struct, frozen=True, array_like=True):
    """Up to where a process has read which stream, and how many bytes that was."""

    generation: Generation
    next: int
    size: int


NOWHERE = Generation("", "-1:")

logger = logging.getLogger("qtasks.rabbitmq")
_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Record)


class RabbitMQLog(Rewritable):
    """One stream at a time per namespace, without a limit of size or age. See `Generations`."""

    def __init__(self, url: str = "amqp://localhost") -> None:
        servers_of(url)
        self._url = url
        self._names = Names("")
        self._namespace = ""
        self._writing: Connection | None = None
        self._reading: Connection | None = None
        self._reader: Channel | None = None
        self._target = NOWHERE
        """Where appends go: the newest generation that this process knows."""
        self._at = NOWHERE
        """What is being read: the newest generation, or an older one that leads to it."""
        self._next = 0
        """The offset after the last returned record."""
        self._size = 0
        """How many bytes of the generation were read."""
        self._turn: Turn | None = None
        """Where reading goes on, if it has come to the end of what counts in a stream."""
        self._until: Position | None = None
        """Where reading ends, for a copy."""
        self._replaced = ""
        """Why the reader has to forget what it has read, until it seeks."""
        self._arrived: deque[tuple[int, int, bytes]] = deque()
        self._bell = asyncio.Event()
        self._opening: Shielded[Channel] = Shielded()
        self._marks: dict[str, Mark] = {}
        self._unread: dict[str, bytes] = {}
        """What was appended and not read back yet. If it came too late, it is appended again."""
        self._lost = 0
        """How many times it became unknown whether what was appended counts."""
        self._gone = ""
        """Why there is no log to go on with."""
        self._prepared: tuple[Generation, Turn] | None = None
        """The generation that is copied, and the turn to the copy."""

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

    @property
    def size(self) -> int:
        return self._size

    async def migrate(self, namespace: str) -> list[str]:
        log = RabbitMQLog(self._url)
        try:
            return await log._migrate(namespace)
        finally:
            await log.stop()

    async def _migrate(self, namespace: str) -> list[str]:
        self._names = Names(namespace)
        self._writing = Connection(self._url, "migration", HEARTBEAT, _nothing)
        missing = not await there(self._writing, self._names.log)
        await self._generations().newest()
        await self._writing.registered()
        return [f"stream {self._names.log} created"] if missing else []

    async def start(self, namespace: str) -> None:
        self._namespace = namespace
        self._names = Names(namespace)
        if self._writing is None:
            self._forget_all()
            self._writing = Connection(self._url, "log writer", HEARTBEAT, _nothing)
            self._reading = Connection(self._url, "log reader", HEARTBEAT, self._consume)
        if self._target is NOWHERE:
            self._target = self._at = await self._generations().newest()

    def _generations(self) -> Generations:
        if self._writing is None:
            raise Closed("RabbitMQLog is not started")
        return Generations(self._writing, self._names)

    def _forget_all(self) -> None:
        self._lost += 1
        self._target = self._at = NOWHERE
        self._next = self._size = 0
        self._turn, self._replaced, self._gone, self._prepared = None, "", "", None
        self._arrived.clear()
        self._marks.clear()
        self._unread.clear()

    async def stop(self) -> None:
        await self._opening.abandon()
        connections = (self._writing, self._reading)
        self._writing = self._reading = self._reader = None
        for connection in connections:
            if connection is not None:
                await connection.close()
        self._bell.set()

    async def append(self, entries: Sequence[Entry]) -> list[str | None]:
        bodies = [_body(Record(entry.partition_key, entry.key, entry.value)) for entry in entries]
        return await self._append([entry.key for entry in entries], bodies)

    async def _append(self, keys: Sequence[str], bodies: Sequence[bytes]) -> list[str | None]:
        """Publish records that this process will read back."""
        # All of them to one stream. If the log goes on in another one meanwhile, the reader
        # appends them there again, in this order.
        target, lost = self._target, self._lost
        if target is NOWHERE:
            raise Unavailable(self._gone or "the log is being read anew; try again")
        self._unread.update(zip(keys, bodies, strict=True))
        try:
            answers = await self._publish(bodies, target)
            if self._lost != lost:
                raise Unavailable("the log went on in another stream; try again")
        except BaseException:
            self._drop(keys)
            raise
        self._drop([key for key, refused in zip(keys, answers, strict=True) if refused is not None])
        return answers

    def _drop(self, keys: Sequence[str]) -> None:
        for key in keys:
            self._unread.pop(key, None)

    async def read(self) -> list[Entry]:
        while True:
            self._bell.clear()
            if self._reading is None:
                raise Closed("RabbitMQLog is not started")
            if self._replaced:
                raise Replaced(self._replaced)
            if self._turn is not None:
                await self._follow(self._reading, self._turn)
            if self._complete:
                return []
            if self._reader is None or self._reader.lost is not None:
                self._reader = await self._opening.run(self._open)
            if self._arrived:
                reached, entries = await self._collect(self._reading, self._reader)
                if entries or reached:
                    return entries
            else:
                await self._bell.wait()

    async def _open(self) -> Channel:
        """Go on after the last returned record, unless the log has become another one."""
        reading = self._reading
        generations = self._generations()
        if (await generations.newest()).log != self._at.log:
            self._replaced = f"the stream {self._names.log} was created again"
        elif not await generations.exists(self._at):
            self._replaced = f"the stream {generations.stream(self._at.name)} is gone"
        if self._replaced:
            raise Replaced(self._replaced)
        if reading is None:
            raise Closed("RabbitMQLog is not started")
        return await once_created(reading.channel)

    async def _follow(self, reading: Connection, turn: Turn) -> None:
        """Go on reading in another stream.

        What was appended to the one before, and was not read there, came too late. It is appended
        again.
        """
        if turn.generation.number > self._target.number:
            self._target = turn.generation
            late = dict(self._unread)
            try:
                await self._publish(list(late.values()), turn.generation)
            except BaseException:
                self._lost += 1
                self._drop(list(late))
                raise
        reading.discard("reading another stream")
        self._arrived.clear()
        self._at, self._next, self._size = turn.generation, turn.offset, turn.size
        self._turn = None

    @property
    def _complete(self) -> bool:
        """Whether everything is read, for a copy."""
        until = self._until
        return until is not None and self._at == until.generation and self._next >= until.next

    @property
    def position(self) -> bytes:
        return msgspec.msgpack.encode(Position(self._at, self._next, self._size))

    async def seek(self, position: bytes | None) -> bool:
        if self._reading is None:
            raise Closed("RabbitMQLog is not started")
        await self._opening.abandon()
        self._reading.discard("seeking")
        self._forget_all()
        generations = self._generations()
        newest = await generations.newest()
        at = None if position is None else _position(position)
        fits = at is not None and at.generation.log == newest.log
        if at is not None and fits and await generations.exists(at.generation):
            self._at, self._next, self._size = at.generation, at.next, at.size
            # A pointer may lag.
            self._target = max(newest, at.generation, key=lambda each: each.number)
            return True
        if not await generations.exists(newest):
            self._gone = (
                f"the stream {generations.stream(newest.name)} is gone. If its records are not "
                f"needed, delete the stream {self._names.log} too: it is then created again"
            )
            raise Unavailable(self._gone)
        self._target = self._at = newest
        return position is None

    async def mark(self) -> object:
        """Write a mark record and return the mark, because a stream's end cannot be queried."""
        mark = Mark()
        self._marks[mark.id] = mark
        try:
            await self._append([mark.id], [_body(Record(mark=mark.id))])
        except BaseException:
            self._marks.pop(mark.id, None)
            raise
        return mark

    def reached(self, mark: object) -> bool:
        return isinstance(mark, Mark) and mark.reached and not self._replaced

    async def _publish(self, bodies: Sequence[bytes], target: Generation) -> list[str | None]:
        """Publish records. Return for each None, or why it is too large for the server."""
        from qtasks_rabbitmq.channel import Sending

        if self._writing is None:
            raise Closed("RabbitMQLog is not started")
        stream = self._generations().stream(target.name)
        answers: list[str | None] = []
        for part in split(map(len, bodies), MOST_AT_ONCE, MOST_BYTES_AT_ONCE):
            sendings = [Sending(body, stream) for body in bodies[part]]
            refused = await self._writing.publish(sendings)
            most = self._writing.largest or HARD_LIMIT
            for at, reason in refused.items():
                if len(sendings[at].body) <= most:
                    raise Unavailable(f"the stream {stream}: {reason}")
            answers += [refused.get(at) for at in range(len(sendings))]
        return answers

    async def _collect(self, reading: Connection, reader: Channel) -> tuple[bool, list[Entry]]:
        """Return whether a mark of this log was reached, and the entries that have arrived."""
        from pamqp.commands import Basic

        # This asks for more. It comes before anything is taken, so a cancellation here skips
        # nothing.
        async with reading.answering():
            await reader.send(Basic.Ack(delivery_tag=self._arrived[-1][1], multiple=True))
        reached = False
        entries: list[Entry] = []
        while self._arrived and not self._complete:
            offset, _, body = self._arrived.popleft()
            record = _decode(offset, body)
            if record is not None and record.turn is not None:
                self._turn = record.turn
                break
            self._next = offset + 1
            self._size += len(body)
            if record is None:
                continue
            self._unread.pop(record.mark or record.key, None)
            if not record.mark:
                entries.append(Entry(record.partition_key, record.key, record.value))
            elif (mark := self._marks.pop(record.mark, None)) is not None:
                mark.reached = reached = True
        return reached, entries

    async def _consume(self, channel: Channel, _purpose: str, _version: tuple[int, ...]) -> None:
        """Continue to read after the last returned record, on a new connection."""
        from pamqp.commands import Basic

        self._arrived.clear()
        channel.on_delivery = partial(self._arrive, channel)
        channel.on_lost = self._bell.set
        stream = f"{self._names.log}:{self._at.name}"
        offset: dict[str, Any] = {"x-stream-offset": self._next or "first"}
        end: dict[str, Any] = {"x-stream-offset": "next"}
        await channel.call(
            Basic.Qos(prefetch_count=PREFETCH),
            Basic.Consume(queue=stream, consumer_tag=stream, arguments=offset),
            # Who consumes a stream is told when it is deleted.
            Basic.Consume(queue=self._names.log, consumer_tag=self._names.log, arguments=end),
        )

    # -- rewriting

    @property
    def name(self) -> str:
        return self._target.name

    def successor(self) -> str:
        return new_name(self._target.number + 1)

    @property
    def prepared(self) -> bool:
        return self._prepared is not None and self._prepared[0] == self._target

    async def prepare(self, name: str, position: bytes, living: Living) -> None:
        at, target = _position(position), self._target
        if at is None or at.generation != target or number_of(name) != target.number + 1:
            raise Unavailable("the log was rewritten meanwhile")
        new = Generation(target.log, name, target.name)
        await self._generations().create(name)
        source = RabbitMQLog(self._url)
        source._until = at
        writing = Connection(self._url, "log copy", HEARTBEAT, _nothing)
        try:
            await source.start(self._namespace)
            size = 0
            while True:
                entries = await _soon(source)
                if not entries and source._complete:
                    break
                size += await self._copy(writing, new, await living(entries))
            base = _body(Record(turn=Turn(at.generation, at.next)))
            await self._write(writing, new, [base])
            offset = await once_created(lambda: self._offset_of(writing, new, base))
        finally:
            await source.stop()
            await writing.close()
        self._prepared = at.generation, Turn(new, offset + 1, size)

    async def _copy(self, writing: Connection, new: Generation, entries: Sequence[Entry]) -> int:
        """Write entries to a new generation, and return how many bytes they have."""
        bodies = [_body(Record(entry.partition_key, entry.key, entry.value)) for entry in entries]
        for part in split(map(len, bodies), MOST_AT_ONCE, MOST_BYTES_AT_ONCE):
            await self._write(writing, new, bodies[part])
        return sum(map(len, bodies))

    async def _write(self, writing: Connection, new: Generation, bodies: Sequence[bytes]) -> None:
        from qtasks_rabbitmq.channel import Sending

        stream = f"{self._names.log}:{new.name}"
        refused = await writing.publish([Sending(body, stream) for body in bodies])
        for reason in refused.values():
            raise Unavailable(f"the stream {stream}: {reason}")

    async def _offset_of(self, writing: Connection, new: Generation, last: bytes) -> int:
        """Return the offset of the last record of a new generation."""
        stream = f"{self._names.log}:{new.name}"
        async with aclosing(records(writing, stream, "last")) as found:
            async for offset, body in found:
                if body == last:
                    return offset
        raise Unavailable(f"the end of the stream {stream} could not be read")

    async def switch(self) -> None:
        prepared, self._prepared = self._prepared, None
        if prepared is not None and prepared[0] == self._target:
            # Only the first turn in a stream counts.
            await self._publish([_body(Record(turn=prepared[1]))], self._target)

    async def forget(self, names: Sequence[str]) -> list[str]:
        generations, target = self._generations(), self._target
        newest = await generations.newest()
        if newest.log != target.log:
            return list(names)
        if newest.number < target.number:
            # Whoever starts from now on does not need what the next call deletes.
            await generations.point(target)
            return list(names)
        # Only one of equal number has become the log. A higher number may still become it.
        needed = (target.name, target.base)
        gone = [name for name in names if number_of(name) <= target.number and name not in needed]
        for name in gone:
            await generations.delete(name)
        return [name for name in names if name not in gone]

    def _arrive(self, channel: Channel, arrival: Arrival) -> None:
        if arrival.consumer == self._names.log:
            return
        # Offsets are consecutive. The server's offset is missing only if a record's properties are
        # completely unreadable.
        following = self._arrived[-1][0] + 1 if self._arrived else self._next
        offset = arrival.headers.get("x-stream-offset", following)
        if channel.lost is None and offset >= self._next:
            self._arrived.append((offset, arrival.tag, arrival.body))
            self._bell.set()


async def _soon(source: RabbitMQLog) -> list[Entry]:
    """Return the next entries of a log that is copied. Raises `Unavailable`."""
    try:
        async with asyncio.timeout(STALLED):
            return await source.read()
    except TimeoutError:
        raise Unavailable(f"nothing could be read from the log for {STALLED} s") from None
    except Replaced as replaced:
        raise Unavailable(f"the log cannot be copied: {replaced}") from replaced


def _body(record: Record) -> bytes:
    return VERSION + _encoder.encode(record)


def _position(data: bytes) -> Position | None:
    """Return a position, or None if another release has written it in another form."""
    try:
        return msgspec.msgpack.decode(data, type=Position)
    except msgspec.MsgspecError:
        return None


async def _nothing(_channel: Channel, _purpose: str, _version: tuple[int, ...]) -> None:
    """Set up nothing on a new channel: `Generations` creates what is needed."""


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
