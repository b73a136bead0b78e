"""Operations on queues and workers from outside: counting, purging, commands."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any, TypeVar

from qtasks_core import Command, QueueDepth
from qtasks_core.errors import Closed, Unavailable, WireError
from qtasks_core.wire import decode_command, encode_command
from qtasks_rabbitmq.connection import Connection
from qtasks_rabbitmq.delays import LEVELS
from qtasks_rabbitmq.lanes import find_lanes
from qtasks_rabbitmq.topology import NOT_FOUND, USUAL, Names, command_methods, declare

if TYPE_CHECKING:
    from qtasks_rabbitmq.channel import Arrival, Channel

T = TypeVar("T")

logger = logging.getLogger("qtasks.rabbitmq")

PREFETCH = 100
"""Commands that a listener may hold before it acknowledges them."""
NEW_LANES = b"\x00lanes"
"""A record of the stream of commands that is no command."""
FROM_NOW_ON: dict[str, Any] = {"x-stream-offset": "next"}
PAUSE = 0.02
"""Seconds between two questions whether a level of the ladder is empty."""
QUIET = 2.0
"""Seconds without a message after which a level holds no more."""
NOT_READY = ("INTERNAL_ERROR", "Stream not found")
"""The server's words for a stream that was just declared."""
CREATION = 3.0
"""Seconds within which a declared stream is ready for use."""


async def depth(connection: Connection, names: Names, queue: str) -> QueueDepth:
    """Count the messages that a receiver would find now.

    The server does not tell how many messages its consumers hold. All queues of a namespace share
    the ladder. So the number of delayed messages is known only if the ladder is empty.
    """
    async with connection.asking() as channel:
        lanes = await find_lanes(channel, names, [queue])
        ready = [
            count
            for priority in (USUAL, *(priority for _, priority in lanes))
            for count in await _ready(channel, [names.queue(queue, priority)])
        ]
        delayed = sum(await _ready(channel, _levels(names)))
    return QueueDepth(ready=sum(ready), delayed=None if delayed else 0, in_flight=None)


def control_connection(url: str, purpose: str, heartbeat: int) -> Connection:
    """Return a connection of its own: what happens to it does not affect publishers."""
    return Connection(url, purpose, heartbeat, _nothing)


async def purge(url: str, heartbeat: int, names: Names, queue: str) -> int:
    """Drop the messages that are not in flight, on a connection of its own. Return their number.

    Delayed messages move down the ladder, so it is emptied from the top. The queue comes last. If
    something was found, another round looks for messages that were between two levels.
    """
    connection = control_connection(url, "purge", heartbeat)
    try:
        return await _purge(connection, await connection.channel(), names, queue)
    finally:
        await connection.close()


async def _purge(connection: Connection, channel: Channel, names: Names, queue: str) -> int:
    from pamqp.commands import Queue

    dropped, found = 0, True
    targets = names.all_lanes(queue)
    while found:
        async with connection.answering():
            levels = len(await _ready(channel, _levels(names)))
        delayed = [
            await _drop_delayed(connection, channel, level, targets)
            for level in reversed(_levels(names)[:levels])
        ]
        found = any(delayed)
        dropped += sum(delayed)
    async with connection.answering():
        lanes = [(queue, USUAL), *await find_lanes(channel, names, [queue])]
        for source in [names.queue(*lane) for lane in lanes]:
            if not await _ready(channel, [source]):
                continue
            async with channel.aside() as aside:
                (answer,) = await aside.call(Queue.Purge(queue=source))
            assert isinstance(answer, Queue.PurgeOk)
            dropped += answer.message_count or 0
    return dropped


async def _ready(channel: Channel, queues: Sequence[str]) -> list[int]:
    """Return the numbers of ready messages, up to the first queue that does not exist."""
    from pamqp.commands import Queue

    numbers: list[int] = []
    async with channel.aside() as aside:
        try:
            for queue in queues:
                (answer,) = await aside.call(Queue.Declare(queue=queue, passive=True))
                assert isinstance(answer, Queue.DeclareOk)
                numbers.append(answer.message_count or 0)
        except Unavailable:
            if aside.close_code != NOT_FOUND:
                raise
    return numbers


def _levels(names: Names) -> list[str]:
    """Return the queues of the ladder. They are declared in this order, as far as needed."""
    return [names.level(level) for level in range(LEVELS)]


async def _drop_delayed(
    connection: Connection, channel: Channel, level: str, targets: Collection[str]
) -> int:
    """Drop the messages of a level that wait for one of the lanes `targets`. Return their number.

    AMQP cannot look into a queue. So this consumes the whole level, acknowledges the messages of
    the lanes, and returns all others in their order. These keep their time, but none of them leaves
    the level meanwhile.
    """
    from pamqp.commands import Basic

    dropping: list[int] = []
    kept = dropped = 0

    def take(arrival: Arrival) -> None:
        nonlocal kept
        if arrival.routing_key in targets:
            dropping.append(arrival.tag)
        else:
            kept += 1

    async with connection.answering():
        expected = sum(await _ready(channel, [level]))
    if not expected:
        return 0
    clock = asyncio.get_running_loop().time
    async with channel.aside() as aside:
        aside.on_delivery = take
        async with connection.answering(expected):
            await aside.call(
                Basic.Qos(prefetch_count=0), Basic.Consume(queue=level, consumer_tag="all")
            )
        seen, moved = 0, clock()
        # The server counts a message as delivered before it sends it. So wait for as many as were
        # there, or until none has come for a while: some may have become due meanwhile.
        while True:
            # The queue answers when it has sent what it was about to send.
            async with connection.answering(expected):
                waiting = sum(await _ready(channel, [level]))
                tags, dropping = dropping, []
                dropped += len(tags)
                await aside.send(*(Basic.Ack(delivery_tag=tag) for tag in tags))
                await aside.call(Basic.Qos(prefetch_count=0))
            if dropped + kept > seen:
                seen, moved = dropped + kept, clock()
            enough = seen >= expected or clock() - moved > QUIET
            if enough and not waiting and not dropping:
                break
            await asyncio.sleep(PAUSE)
        async with connection.answering(kept):
            await aside.call(Basic.Cancel(consumer_tag="all"))
            # The tag 0 stands for all deliveries of the channel.
            await aside.send(Basic.Nack(delivery_tag=0, multiple=True, requeue=True))
            await aside.call(Basic.Qos(prefetch_count=0))
        # The queue takes them back a little later. Some of them may be due by then.
        returned = clock()
        while clock() - returned < QUIET:
            async with connection.answering(kept):
                if sum(await _ready(channel, [level])) >= kept:
                    break
            await asyncio.sleep(PAUSE)
    return dropped


async def broadcast(connection: Connection, names: Names, command: Command) -> None:
    """Append a command to the stream that every listener reads."""
    from qtasks_rabbitmq.channel import Sending

    sending = Sending(encode_command(command), names.commands)

    async def send() -> None:
        if await connection.publish([sending]):
            # The stream does not exist yet, or somebody has deleted it.
            async with connection.asking() as channel:
                await declare(channel, names, command_methods(names))
            if refused := await connection.publish([sending]):
                raise Unavailable(f"the command was not sent: {refused[0]}")

    await _once_created(send)


async def announce_lanes(connection: Connection, names: Names) -> None:
    """Tell listeners that queues have new lanes. Without a stream, nobody listens.

    Listeners do not take it for a command. Raises `Unavailable`, `ConfigurationError`.
    """
    from qtasks_rabbitmq.channel import Sending

    async def send() -> None:
        await connection.publish([Sending(NEW_LANES, names.commands)])

    await _once_created(send)


async def _once_created(use: Callable[[], Awaitable[T]]) -> T:
    """Use the stream, and try again while the server is still creating it.

    Another process may have declared it a moment ago. Until it is ready, the server drops every
    connection that uses it (seen on RabbitMQ 3.10). So listeners have a connection of their own.
    """
    clock = asyncio.get_running_loop().time
    deadline = clock() + CREATION
    while True:
        try:
            return await use()
        except Unavailable as error:
            if clock() > deadline or not any(words in str(error) for words in NOT_READY):
                raise
        await asyncio.sleep(PAUSE)


class Listeners:
    """The iterators of a broker over commands, so that `stop` finishes them all."""

    def __init__(self, url: str, heartbeat: int, on_lanes: Callable[[], None]) -> None:
        self._connection = control_connection(url, "listener", heartbeat)
        self._on_lanes = on_lanes
        """Called when queues may have new lanes."""
        self._bells: set[asyncio.Event] = set()
        self._stopped = False

    async def follow(self, names: Names) -> AsyncIterator[Command]:
        """Yield the commands that are sent from now on. Each call reads the stream by itself."""
        from pamqp.commands import Basic

        arrived: deque[Arrival] = deque()
        bell = asyncio.Event()

        def take(arrival: Arrival) -> None:
            arrived.append(arrival)
            bell.set()

        if self._stopped:
            raise Closed("RabbitMQBroker was stopped")
        self._bells.add(bell)
        try:
            async with AsyncExitStack() as stack:

                async def listen() -> Channel:
                    async with self._connection.asking() as channel:
                        await declare(channel, names, command_methods(names))
                        aside = await stack.enter_async_context(channel.aside())
                        aside.on_delivery, aside.on_lost = take, bell.set
                        await aside.call(
                            Basic.Qos(prefetch_count=PREFETCH),
                            Basic.Consume(queue=names.commands, arguments=FROM_NOW_ON),
                        )
                        return aside

                aside = await _once_created(listen)
                self._on_lanes()  # some may have been announced before
                while not self._stopped:
                    await bell.wait()
                    bell.clear()
                    found = list(arrived)
                    arrived.clear()
                    if any(arrival.body == NEW_LANES for arrival in found):
                        self._on_lanes()
                    for command in _decoded(found):
                        yield command
                    if aside.lost is not None:
                        raise Unavailable(f"commands cannot be heard: {aside.lost}")
                    if found:
                        await aside.send(Basic.Ack(delivery_tag=found[-1].tag, multiple=True))
        except Unavailable:
            if not self._stopped:
                raise
        finally:
            self._bells.discard(bell)
        raise Closed("RabbitMQBroker was stopped")

    async def stop(self) -> None:
        """Finish all iterators."""
        self._stopped = True
        for bell in self._bells:
            bell.set()
        await self._connection.close()


def _decoded(arrivals: Sequence[Arrival]) -> list[Command]:
    commands: list[Command] = []
    for arrival in arrivals:
        if arrival.body == NEW_LANES:
            continue
        try:
            commands.append(decode_command(arrival.body))
        except WireError as error:
            logger.warning("a command was passed over: %s", error)
    return commands


async def _nothing(_channel: Channel, _purpose: str, _version: tuple[int, ...]) -> None:
    """Set up nothing on a new channel: the operations declare what they need."""
