"""An AMQP channel made for batches, on a connection of aiormq.

The driver's own channel uses a future, a lock and a task for every message. This channel writes a
batch of publishes at once and waits once. It passes on deliveries without a task. It matches
replies to methods by their order, so a cancelled call closes nothing. It counts the confirms
itself.

The driver has no public way to plug in a channel. So this one uses four inner parts of its
connection: it is registered in `channels`, gets frames by `put` of its `frames`, writes a
`ChannelFrame` to `write_queue`, and hears of the end by `closing`. `pyproject.toml` allows the
releases of aiormq that have them.

This module imports the driver. Only `connection.py` imports this module, and only to connect.
"""

from __future__ import annotations

import asyncio
import re
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from itertools import count
from typing import Any, TypeAlias, cast

from aiormq.abc import AbstractChannel, AbstractConnection, ChannelFrame
from msgspec import Struct
from pamqp import commands, frame
from pamqp.base import Frame
from pamqp.body import ContentBody
from pamqp.header import ContentHeader

from qtasks_core.errors import ConfigurationError, Unavailable
from qtasks_rabbitmq.frames import (
    BODY,
    PERSISTENT,
    Deliver,
    Properties,
    content_of,
    framed,
    properties_frame,
    read_deliver,
    read_properties,
)

FRAME_OVERHEAD = 8
ACCESS_REFUSED = 403
NOT_FOUND = 404
PRECONDITION_FAILED = 406
PUBLISH = (60, 40)
"""Class and method of a publish, as the server names them when it closes a channel."""
CONSUMER_TIMEOUT = re.compile(r"acknowledgement .* timed out. Timeout value used: (\d+) ms")
MAX_SIZE = re.compile(r"larger than configured max size (\d+)")
REGISTRATION = 1.5
"""Seconds after which the server has saved a new queue's name: see `Channel.registered`."""


class Arrival(Struct, frozen=True):
    """A message that a consumer received."""

    consumer: str
    tag: int
    routing_key: str
    headers: dict[str, Any]
    body: bytes
    error: str
    """The reason why its properties are unreadable; empty if they are readable."""


OnDelivery: TypeAlias = Callable[[Arrival], None]
"""The connection's reader calls it."""


class Sending(Struct, frozen=True, gc=False):
    """One message to publish to an exchange."""

    body: bytes
    routing_key: str
    exchange: str = ""
    message_id: str = ""
    """Identifies the message if the server returns it."""
    headers: dict[str, Any] | None = None
    priority: int | None = None
    """For a server that delivers by priority."""


class Batch:
    """Messages that are written together and confirmed one by one."""

    __slots__ = ("confirmed", "first", "refusals", "sendings", "waiting")

    def __init__(self, sendings: Sequence[Sending], first: int) -> None:
        self.sendings = sendings
        self.first = first
        self.waiting = len(sendings)
        self.refusals: dict[int, str] = {}
        self.confirmed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def confirm(self, tag: int, taken: bool) -> None:
        """Note the server's confirm of one message. The last confirm finishes the wait."""
        if not taken:
            self.refusals.setdefault(tag - self.first, "the server did not take the message")
        self.waiting -= 1
        if not self.waiting and not self.confirmed.done():
            self.confirmed.set_result(None)

    def refuse(self, exchange: str, routing_key: str, message_id: str, reason: str) -> None:
        """Note that the server returned a message, because no queue matches."""
        for index, sending in enumerate(self.sendings):
            if (sending.exchange, sending.routing_key, sending.message_id) == (
                exchange,
                routing_key,
                message_id,
            ):
                self.refusals[index] = reason


class Channel:
    """A channel of a connection. If the channel is lost, every wait raises `Unavailable`."""

    def __init__(self, connection: AbstractConnection, name: str) -> None:
        self._connection = connection
        self._name = name
        self._number = number = next(n for n in count(1) if n not in connection.channels)
        self._loop = asyncio.get_running_loop()
        self._replies: deque[asyncio.Future[Frame]] = deque()
        self._batches: list[Batch] = []
        self._unconfirmed: dict[int, Batch] = {}
        self._published = 0
        self._confirmed = 0
        self._content: Deliver | commands.Basic.Return | None = None
        self._properties: Properties | None = None
        self._parts: list[bytes] = []
        self._missing = 0
        self._publish_frames: dict[tuple[str, str], bytes] = {}
        self._body_size = connection.connection_tune.frame_max - FRAME_OVERHEAD
        self.on_delivery: OnDelivery | None = None
        self.on_lost: Callable[[], None] | None = None
        self.lost: str | None = None
        """The reason why the channel is lost; None while it works."""
        self.close_code = 0
        """The server's reply code, if the server closed the channel."""
        self.largest: int | None = None
        """The server's limit for a message in bytes, if that limit closed the channel."""
        self.consumer_timeout: float | None = None
        """The server's consumer timeout in seconds, if that timeout closed the channel."""
        self.heard = self._loop.time()
        """The loop's time of the last frame from the server on this channel."""
        self._registered_at = 0.0
        # The connection passes a channel's frames to `frames.put`.
        self.frames = self
        connection.channels[number] = cast(AbstractChannel, self)
        connection.closing.add_done_callback(self._on_connection_closed)

    async def open(self) -> None:
        """Open the channel and enable publisher confirms."""
        await self.call(commands.Channel.Open(), commands.Confirm.Select())

    async def call(self, *methods: Frame) -> list[Frame]:
        """Send methods in one write and return the server's replies.

        Raises `Unavailable`, and `ConfigurationError` if the user lacks a right.
        """
        await self.send(*methods)
        replies: list[asyncio.Future[Frame]] = [self._loop.create_future() for _ in methods]
        self._replies.extend(replies)
        return [await reply for reply in replies]

    async def send(self, *methods: Frame) -> None:
        """Send methods that have no reply. If cancelled, it has sent all of them or none."""
        await self._write(b"".join(frame.marshal(method, self._number) for method in methods))

    async def publish(self, sendings: Sequence[Sending]) -> dict[int, str]:
        """Publish messages, and wait once until the server has confirmed all of them.

        Returns the refused messages, by index, with the reason. Raises `Unavailable`.
        """
        await self._write(b"".join([self._marshal(sending) for sending in sendings]))
        batch = Batch(sendings, self._published + 1)
        self._published += len(sendings)
        for tag in range(batch.first, self._published + 1):
            self._unconfirmed[tag] = batch
        self._batches.append(batch)
        try:
            await batch.confirmed
        finally:
            self._batches.remove(batch)
        return batch.refusals

    def note_creation(self) -> None:
        """Note that queues have just been created."""
        self._registered_at = self._loop.time() + REGISTRATION

    async def registered(self) -> None:
        """Wait until new queues survive a crash.

        The server answers the declaration of a replicated queue first. Its Raft library writes the
        queue's name to disk up to 1.25 s later. After a crash in between, the queue has no leader,
        and even its confirmed messages are lost.
        """
        young = self._registered_at - self._loop.time()
        if young > 0:
            await asyncio.sleep(young)

    @asynccontextmanager
    async def aside(self) -> AsyncIterator[Channel]:
        """Open another channel of this connection, for methods whose failure closes the channel."""
        other = Channel(self._connection, self._name)
        await other.call(commands.Channel.Open())
        try:
            yield other
        finally:
            if other.lost is None:
                await other.send(commands.Channel.Close(200, "done", 0, 0))
                other.fail(f"{self._name}: the channel was closed")

    async def put(self, item: tuple[int, Any]) -> None:
        """Take a frame from the connection's reader."""
        received = item[1]
        self.heard = self._loop.time()
        match received:
            case ContentBody():
                for payload in content_of(received.value):
                    self._take(payload)
            case commands.Basic.Return():
                self._content = received
            case commands.Basic.Ack():
                self._confirm(received.delivery_tag or 0, received.multiple, True)
            case commands.Basic.Nack():
                self._confirm(received.delivery_tag or 0, received.multiple, False)
            case commands.Basic.Cancel():
                if self.lost is None:
                    await self.send(commands.Channel.Close(200, "a consumer is gone", 0, 0))
                self.fail(f"{self._name} cancelled a consumer: its queue was deleted or moved")
            case commands.Channel.Close():
                await self._on_close(received)
            case _ if self._replies:
                reply = self._replies.popleft()
                if not reply.done():
                    reply.set_result(received)

    def fail(self, reason: str) -> None:
        """Finish every wait with the error of the loss. The channel is not used again."""
        if self.lost is not None:
            return
        self.lost = reason
        self._connection.closing.remove_done_callback(self._on_connection_closed)
        waiting: list[asyncio.Future[Any]] = [*self._replies]
        waiting.extend(batch.confirmed for batch in self._batches)
        for future in waiting:
            if not future.done():
                future.set_exception(self._error())
                # Mark it as retrieved: a cancelled caller never reads it.
                future.exception()
        if self.on_lost is not None:
            self.on_lost()

    async def _on_close(self, close: commands.Channel.Close) -> None:
        """Note the server's reason for closing the channel."""
        self.close_code = close.reply_code or 0
        text = close.reply_text or ""
        if (close.class_id, close.method_id) == PUBLISH and (size := MAX_SIZE.search(text)):
            self.largest = int(size[1])
        if timeout := CONSUMER_TIMEOUT.search(text):
            self.consumer_timeout = int(timeout[1]) / 1000
        if self.lost is None:
            await self.send(commands.Channel.CloseOk())
        self.fail(f"{self._name} closed the channel: {text}")

    def _error(self) -> Exception:
        """Return the error that the loss means.

        ACCESS_REFUSED is the only final reason. Any other reason may pass, or only one of the
        callers on this channel has caused it.
        """
        reason = self.lost or ""
        if self.close_code == ACCESS_REFUSED:
            return ConfigurationError(f"{reason} (docs/rights.md lists the rights that are needed)")
        return Unavailable(reason)

    async def _write(self, payload: bytes) -> None:
        if self.lost is not None:
            raise self._error()
        # With this future, the driver's writer waits for the socket. This limits the memory.
        drained = self._loop.create_future()
        await self._connection.write_queue.put(ChannelFrame(payload, False, drained))
        # The caller continues in the same step, so replies are awaited in the order of the writes.
        if self.lost is not None:
            raise self._error()

    def _marshal(self, sending: Sending) -> bytes:
        target = (sending.exchange, sending.routing_key)
        publish = self._publish_frames.get(target)
        if publish is None:
            method = commands.Basic.Publish(
                exchange=sending.exchange, routing_key=sending.routing_key, mandatory=True
            )
            publish = self._publish_frames[target] = frame.marshal(method, self._number)
        body = sending.body
        pieces = [publish, self._header(sending)]
        for start in range(0, len(body), self._body_size):
            pieces.append(framed(BODY, self._number, body[start : start + self._body_size]))
        return b"".join(pieces)

    def _header(self, sending: Sending) -> bytes:
        """Return the frame of a message's properties."""
        if not sending.headers:
            # Skip the driver, which builds and checks several objects for this.
            return properties_frame(
                self._number, len(sending.body), sending.message_id, sending.priority
            )
        properties = commands.Basic.Properties(
            delivery_mode=PERSISTENT,
            priority=sending.priority,
            message_id=sending.message_id or None,
            headers=sending.headers,
        )
        header = ContentHeader(body_size=len(sending.body), properties=properties)
        return frame.marshal(header, self._number)

    def _take(self, value: bytes) -> None:
        """Take the next frame of a message."""
        if self._content is None:
            self._content = read_deliver(value)
            return
        if self._properties is None:
            self._properties = read_properties(value)
            self._missing = self._properties.size
        else:
            self._parts.append(value)
            self._missing -= len(value)
        if not self._missing:
            self._end_content(self._content, self._properties)

    def _end_content(
        self, content: Deliver | commands.Basic.Return, properties: Properties
    ) -> None:
        """Pass on a complete delivery or a complete returned message."""
        body = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
        self._content = self._properties = None
        self._parts = []
        if isinstance(content, commands.Basic.Return):
            reason = f"there is no queue for it ({content.reply_text})"
            exchange, key = content.exchange or "", content.routing_key or ""
            for batch in self._batches:
                batch.refuse(exchange, key, properties.message_id, reason)
        elif self.on_delivery is not None:
            self.on_delivery(
                Arrival(
                    content.consumer,
                    content.tag,
                    content.routing_key,
                    properties.headers,
                    body,
                    properties.error,
                )
            )

    def _confirm(self, tag: int, multiple: bool, taken: bool) -> None:
        tags = range(self._confirmed + 1, tag + 1) if multiple else range(tag, tag + 1)
        for each in tags:
            batch = self._unconfirmed.pop(each, None)
            if batch is not None:
                batch.confirm(each, taken)
        if multiple:
            self._confirmed = tag

    def _on_connection_closed(self, closing: asyncio.Future[Any]) -> None:
        cause = None if closing.cancelled() else closing.exception()
        self.fail(f"{self._name}: the connection was lost" + (f" ({cause})" if cause else ""))
