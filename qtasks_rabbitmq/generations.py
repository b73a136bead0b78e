"""The streams of a log: one generation after the other, and the stream that names the newest.

RabbitMQ cannot compact a stream. So a process copies what still counts into a new stream, the next
generation, and then says in the current one that the log goes on there. Whatever comes behind this
record counts for nobody. A stream's name is never used again.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import Struct
from uuid_utils import uuid7

from qtasks_core.errors import ConfigurationError, Unavailable
from qtasks_rabbitmq.topology import COMMANDS, NOT_FOUND, Names, declare, once_created

if TYPE_CHECKING:
    from qtasks_rabbitmq.channel import Arrival, Channel
    from qtasks_rabbitmq.connection import Connection

STREAM: dict[str, Any] = {"x-queue-type": "stream"}
POINTERS = COMMANDS
"""The stream of pointers stays small too: only its newest record counts."""
EMPTY = 1.0
"""Seconds after which a stream that has sent nothing counts as empty."""
PREFETCH = 2000


class Generation(Struct, frozen=True, array_like=True):
    """One stream of a log. `log` differs if an operator has deleted the log."""

    log: str
    name: str
    base: str = ""
    """The generation before. A reader needs its last entries: see `Turn`."""

    @property
    def number(self) -> int:
        """Say how many generations came before."""
        return number_of(self.name)


class Turn(Struct, frozen=True, array_like=True):
    """Reading goes on at this offset of this generation.

    A new stream begins with a copy of what counted at some offset of the one before. Then comes a
    turn to that offset. The stream before ends with a turn to what follows the copy. A reader that
    starts follows both, a running reader only the second.
    """

    generation: Generation
    offset: int
    size: int = 0
    """How many bytes the copy has."""


def number_of(name: str) -> int:
    """Return the number in the name of a generation."""
    return int(name.partition(":")[0])


def new_name(number: int) -> str:
    """Return a name that no stream has ever had."""
    return f"{number}:{uuid7().hex}"


class Generations:
    """Finds, creates and deletes the streams of a log."""

    def __init__(self, connection: Connection, names: Names) -> None:
        self._connection = connection
        self._names = names

    def stream(self, name: str) -> str:
        """Return the server's name of a generation."""
        return f"{self._names.log}:{name}"

    async def newest(self) -> Generation:
        """Return the newest generation that a pointer names. Create the log if there is none.

        A still newer one may exist: whoever made it has not written the pointer yet.
        """
        known = await there(self._connection, self._names.log)
        async with self._connection.asking() as channel:
            await self._declare(channel, self._names.log, POINTERS)
        if known and (pointers := await once_created(self._pointers)):
            return _newest(pointers)
        made = Generation(uuid7().hex, new_name(0))
        await self.create(made.name)
        await self.point(made)
        newest = _newest(await self._pointers())
        if made != newest:
            await self.delete(made.name)
        return newest

    async def point(self, generation: Generation) -> None:
        """Write a pointer."""
        from qtasks_rabbitmq.channel import Sending

        sending = Sending(_encoder.encode(generation), self._names.log)
        refused = await once_created(lambda: self._connection.publish([sending]))
        if refused:
            raise Unavailable(f"the stream {self._names.log}: {refused[0]}")

    async def exists(self, generation: Generation) -> bool:
        """Say whether the stream of a generation exists."""
        return await there(self._connection, self.stream(generation.name))

    async def create(self, name: str) -> None:
        """Create a stream. Raises `ConfigurationError` if the user may not."""
        async with self._connection.asking() as channel:
            await self._declare(channel, self.stream(name), STREAM)

    async def delete(self, name: str) -> None:
        """Delete a stream, if it exists."""
        from pamqp.commands import Queue

        async with self._connection.asking() as channel, channel.aside() as aside:
            await aside.call(Queue.Delete(queue=self.stream(name)))

    async def _declare(self, channel: Channel, stream: str, arguments: dict[str, Any]) -> None:
        from pamqp.commands import Queue

        method = Queue.Declare(queue=stream, durable=True, arguments=dict(arguments))
        await declare(channel, self._names, [method])

    async def _pointers(self) -> list[Generation]:
        """Return all pointers, the oldest first."""
        last = None
        async with aclosing(records(self._connection, self._names.log, "last")) as found:
            async for offset, _ in found:
                last = offset
                break
        if last is None:
            return []
        pointers: list[Generation] = []
        async with aclosing(records(self._connection, self._names.log, "first")) as found:
            async for offset, body in found:
                if (pointer := _pointer(body)) is not None:
                    pointers.append(pointer)
                if offset >= last:
                    return pointers
        raise Unavailable(f"the stream {self._names.log} could not be read to its end")


async def there(connection: Connection, stream: str) -> bool:
    """Say whether a stream exists."""
    from pamqp.commands import Queue

    async with connection.asking() as channel, channel.aside() as aside:
        try:
            await aside.call(Queue.Declare(queue=stream, passive=True))
        except Unavailable:
            if aside.close_code != NOT_FOUND:
                raise
            return False
        except ConfigurationError:
            # The user may not ask. Reading will tell.
            return True
    return True


async def records(
    connection: Connection, stream: str, start: str
) -> AsyncGenerator[tuple[int, bytes], None]:
    """Yield the records of a stream, with their offsets. Stop if nothing comes for a while.

    `start` is `first`, or `last`: the records that were written together last.
    """
    from pamqp.commands import Basic

    arrived: deque[Arrival] = deque()
    bell = asyncio.Event()

    def take(arrival: Arrival) -> None:
        arrived.append(arrival)
        bell.set()

    channel = await connection.channel()
    async with channel.aside() as aside:
        aside.on_delivery, aside.on_lost = take, bell.set
        async with connection.answering():
            await aside.call(
                Basic.Qos(prefetch_count=PREFETCH),
                Basic.Consume(queue=stream, arguments={"x-stream-offset": start}),
            )
        while True:
            try:
                async with asyncio.timeout(EMPTY):
                    await bell.wait()
            except TimeoutError:
                return
            bell.clear()
            while arrived:
                arrival = arrived.popleft()
                yield arrival.headers.get("x-stream-offset", 0), arrival.body
                await aside.send(Basic.Ack(delivery_tag=arrival.tag))
            if aside.lost is not None:
                raise Unavailable(f"the stream {stream} could not be read: {aside.lost}")


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Generation)


def _newest(pointers: list[Generation]) -> Generation:
    """Return the newest generation.

    Of several that are the first one, the first pointer counts: if processes create a log at the
    same time, one of them wins.
    """
    if not pointers:
        raise Unavailable("the pointer that was just written could not be read")
    return max(pointers, key=lambda pointer: pointer.number)


def _pointer(body: bytes) -> Generation | None:
    try:
        pointer = _decoder.decode(body)
        return pointer if pointer.number >= 0 else None
    except (msgspec.MsgspecError, ValueError):
        return None
