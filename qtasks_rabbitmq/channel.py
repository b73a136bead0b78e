"""An AMQP channel made for batches, on a connection of aiormq.

The driver's own channel spends a future, a lock and a task on every message. This one writes a
batch of publishes in one piece and waits once, hands deliveries over without a task, matches
replies to methods in order (so a cancelled call closes nothing), and counts the confirms itself.

Imports the driver: only `connection.py` imports this module, and only to connect.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any, TypeAlias, cast

from aiormq.abc import AbstractChannel, AbstractConnection, ChannelFrame
from msgspec import Struct
from pamqp import commands, frame
from pamqp.base import Frame
from pamqp.body import ContentBody
from pamqp.header import ContentHeader

from qtasks_core.errors import Unavailable

FRAME_OVERHEAD = 8
PERSISTENT = 2
NOT_FOUND = 404
REGISTRATION = 1.5
"""Seconds after which the server remembers a new queue; see `Channel.registered`."""

OnDelivery: TypeAlias = Callable[[str, int, dict[str, Any], bytes], None]
"""Called with consumer tag, delivery tag, headers and body, on the connection's reader."""


class Sending(Struct, frozen=True, gc=False):
    """One message on its way to an exchange."""

    body: bytes
    routing_key: str
    exchange: str = ""
    message_id: str = ""
    """By which a message that the server returns is recognised."""
    headers: dict[str, Any] | None = None


class Batch:
    """Messages that were written together and are confirmed one by one."""

    __slots__ = ("confirmed", "first", "refusals", "sendings", "waiting")

    def __init__(self, sendings: Sequence[Sending], first: int) -> None:
        self.sendings = sendings
        self.first = first
        self.waiting = len(sendings)
        self.refusals: dict[int, str] = {}
        self.confirmed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def confirm(self, tag: int, taken: bool) -> None:
        """Note the server's word on one message; the last one ends the wait."""
        if not taken:
            self.refusals.setdefault(tag - self.first, "the server did not take the message")
        self.waiting -= 1
        if not self.waiting and not self.confirmed.done():
            self.confirmed.set_result(None)

    def refuse(self, exchange: str, routing_key: str, message_id: str, reason: str) -> None:
        """Note that the server returned a message: it has no queue to go to."""
        for index, sending in enumerate(self.sendings):
            if (sending.exchange, sending.routing_key, sending.message_id) == (
                exchange,
                routing_key,
                message_id,
            ):
                self.refusals[index] = reason


class Channel:
    """A channel of a connection. Every wait ends with `Unavailable` when it is lost."""

    def __init__(self, connection: AbstractConnection, name: str, number: int = 1) -> None:
        self._connection = connection
        self._name = name
        self._number = number
        self._loop = asyncio.get_running_loop()
        self._replies: deque[asyncio.Future[Frame]] = deque()
        self._batches: list[Batch] = []
        self._unconfirmed: dict[int, Batch] = {}
        self._published = 0
        self._confirmed = 0
        self._content: commands.Basic.Deliver | commands.Basic.Return | None = None
        self._header: ContentHeader | None = None
        self._parts: list[bytes] = []
        self._missing = 0
        self._publish_frames: dict[tuple[str, str], bytes] = {}
        self._body_size = connection.connection_tune.frame_max - FRAME_OVERHEAD
        self.on_delivery: OnDelivery | None = None
        self.on_lost: Callable[[], None] | None = None
        self.lost: Unavailable | None = None
        """Why the channel is gone; None while it is there."""
        self.close_code = 0
        """The server's reply code when it closed the channel itself."""
        self.heard = self._loop.time()
        """When the server was last heard of on this channel, on the loop's clock."""
        self._registered_at = 0.0
        self._numbers = count(number + 1)
        # The connection hands the frames of a channel to `frames.put`.
        self.frames = self
        connection.channels[number] = cast(AbstractChannel, self)
        connection.closing.add_done_callback(self._on_connection_closed)

    async def open(self) -> None:
        """Open the channel and turn publisher confirms on."""
        await self.call(commands.Channel.Open(), commands.Confirm.Select())

    async def call(self, *methods: Frame) -> list[Frame]:
        """Send methods in one write and return the server's replies. Raises `Unavailable`."""
        await self.send(*methods)
        replies: list[asyncio.Future[Frame]] = [self._loop.create_future() for _ in methods]
        self._replies.extend(replies)
        return [await reply for reply in replies]

    async def send(self, *methods: Frame) -> None:
        """Send methods that have no reply. Cancelled, it has sent all of them or none."""
        await self._write(b"".join(frame.marshal(method, self._number) for method in methods))

    async def publish(self, sendings: Sequence[Sending]) -> dict[int, str]:
        """Publish messages and wait once until the server has confirmed all.

        Returns the refused ones, by index, with the reason. Raises `Unavailable`.
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

    async def create(self, queues: Sequence[str], methods: Sequence[Frame]) -> None:
        """Declare queues by `methods`, and note when the server will remember those it lacked."""
        if not await self._has(queues):
            await self.call(*methods)
            self._registered_at = self._loop.time() + REGISTRATION
        else:
            await self.call(*methods)

    async def registered(self) -> None:
        """Wait until what was created is safe from a crash.

        The server answers the declaration of a replicated queue before its Raft library has
        written the queue's name to disk, which it does within 1.25 s. After a crash before that,
        the queue has no leader and has lost even what it had confirmed.
        """
        young = self._registered_at - self._loop.time()
        if young > 0:
            await asyncio.sleep(young)

    async def _has(self, queues: Sequence[str]) -> bool:
        """Say whether the server has all these queues; the answer no costs a channel."""
        looking = Channel(self._connection, self._name, next(self._numbers))
        try:
            await looking.call(commands.Channel.Open())
            await looking.call(*(commands.Queue.Declare(queue=q, passive=True) for q in queues))
            await looking.call(commands.Channel.Close(200, "done", 0, 0))
        except Unavailable:
            if looking.close_code != NOT_FOUND:
                raise
            return False
        return True

    async def put(self, item: tuple[int, Any]) -> None:
        """Take a frame from the connection's reader."""
        received = item[1]
        self.heard = self._loop.time()
        match received:
            case commands.Basic.Deliver() | commands.Basic.Return():
                self._content = received
            case ContentHeader():
                self._header = received
                self._missing = received.body_size
                self._end_content()
            case ContentBody():
                self._parts.append(received.value)
                self._missing -= len(received.value)
                self._end_content()
            case commands.Basic.Ack():
                self._confirm(received.delivery_tag or 0, received.multiple, True)
            case commands.Basic.Nack():
                self._confirm(received.delivery_tag or 0, received.multiple, False)
            case commands.Basic.Cancel():
                self.fail(f"{self._name} cancelled a consumer: its queue was deleted or moved")
            case commands.Channel.Close():
                self.close_code = received.reply_code or 0
                await self.send(commands.Channel.CloseOk())
                self.fail(f"{self._name} closed the channel: {received.reply_text}")
            case _ if self._replies:
                reply = self._replies.popleft()
                if not reply.done():
                    reply.set_result(received)

    def fail(self, reason: str) -> None:
        """End every wait with `Unavailable`; the channel is not used again."""
        if self.lost is not None:
            return
        self.lost = Unavailable(reason)
        waiting: list[asyncio.Future[Any]] = [*self._replies]
        waiting.extend(batch.confirmed for batch in self._batches)
        for future in waiting:
            if not future.done():
                future.set_exception(Unavailable(reason))
                # A cancelled caller does not collect it.
                future.exception()
        if self.on_lost is not None:
            self.on_lost()

    async def _write(self, payload: bytes) -> None:
        if self.lost is not None:
            raise Unavailable(str(self.lost))
        # The future makes the driver's writer wait for the socket, which bounds the memory.
        drained = self._loop.create_future()
        await self._connection.write_queue.put(ChannelFrame(payload, False, drained))
        # What follows runs in the same step, so replies are awaited in the order of the writes.
        if self.lost is not None:
            raise Unavailable(str(self.lost))

    def _marshal(self, sending: Sending) -> bytes:
        target = (sending.exchange, sending.routing_key)
        publish = self._publish_frames.get(target)
        if publish is None:
            method = commands.Basic.Publish(
                exchange=sending.exchange, routing_key=sending.routing_key, mandatory=True
            )
            publish = self._publish_frames[target] = frame.marshal(method, self._number)
        body = sending.body
        properties = commands.Basic.Properties(
            delivery_mode=PERSISTENT,
            message_id=sending.message_id or None,
            headers=sending.headers,
        )
        header = ContentHeader(body_size=len(body), properties=properties)
        pieces = [publish, frame.marshal(header, self._number)]
        for start in range(0, len(body), self._body_size):
            part = ContentBody(body[start : start + self._body_size])
            pieces.append(frame.marshal(part, self._number))
        return b"".join(pieces)

    def _end_content(self) -> None:
        """Hand over a delivery or a returned message when it is complete."""
        if self._missing or self._content is None or self._header is None:
            return
        content, properties = self._content, self._header.properties
        body = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
        self._content = self._header = None
        self._parts = []
        if isinstance(content, commands.Basic.Return):
            reason = f"there is no queue for it ({content.reply_text})"
            for batch in self._batches:
                batch.refuse(
                    content.exchange or "",
                    content.routing_key or "",
                    properties.message_id or "",
                    reason,
                )
        elif self.on_delivery is not None:
            tag = content.delivery_tag or 0
            headers = cast("dict[str, Any]", properties.headers or {})
            self.on_delivery(content.consumer_tag or "", tag, headers, body)

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
