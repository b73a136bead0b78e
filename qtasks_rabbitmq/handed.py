"""Holds deliveries of long tasks longer than the server's consumer timeout allows.

Below release 4.3, a server closes the channel of a delivery that is not acknowledged in time, 30
minutes by default. So before that, a copy is published into a queue that only this subscription
reads. Once it holds the copy, it acknowledges the original. If this process dies, the copy expires
in that queue, and the server moves it to where the original came from.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count
from typing import TYPE_CHECKING

from uuid_utils import uuid4

from qtasks_core import Delivery, TaskMessage
from qtasks_core.wire import encode_message
from qtasks_rabbitmq.connection import Connection
from qtasks_rabbitmq.lane import Lane
from qtasks_rabbitmq.parcel import COUNT, Dispatcher
from qtasks_rabbitmq.topology import Names, quorum

if TYPE_CHECKING:
    from pamqp.base import Frame

    from qtasks_rabbitmq.channel import Arrival, Sending

Fence = tuple[int, int, str]

HOLDER = "qtasks-holder"
"""Header: the subscription that a copy is for."""
NUMBER = "qtasks-number"
"""Header: which copy of this subscription it is."""
EXPIRY = 1.0
"""Seconds after which a copy that nobody holds goes back to its lane."""
DISUSE = 86_400.0
"""Seconds after which the server deletes the queue of a subscription that is gone. Its copies have
left it long before."""


class Handed(Lane):
    """The queue of one subscription for its long tasks. It is created when it is first needed."""

    def __init__(
        self, names: Names, connection: Connection, broker: Dispatcher, arrived: Callable[[], None]
    ) -> None:
        self._holder = uuid4().hex
        self._unwanted: list[int] = []
        """Delivery tags of copies that nobody awaits."""
        self._numbers = count(1)
        self._expected: dict[str, asyncio.Future[Fence]] = {}
        """The number of a copy that is on its way -> its fence."""
        super().__init__("", names, names.handed_to(self._holder), 0, connection, broker, arrived)

    def methods(self, version: tuple[int, ...]) -> list[Frame]:
        """Return the methods that declare the queue."""
        from pamqp.commands import Exchange, Queue

        arguments = quorum(version) | {
            "x-message-ttl": round(EXPIRY * 1000),
            "x-expires": round(DISUSE * 1000),
            "x-dead-letter-exchange": self._names.due,
            "x-dead-letter-strategy": "at-least-once",
            "x-overflow": "reject-publish",
        }
        return [
            Exchange.Declare(exchange=self._names.handed, exchange_type="headers", durable=True),
            Queue.Declare(queue=self.source, durable=True, arguments=arguments),
            Queue.Bind(
                queue=self.source,
                exchange=self._names.handed,
                arguments={"x-match": "all", HOLDER: self._holder},
            ),
        ]

    async def take_over(self, held: Sequence[tuple[Delivery, str]]) -> list[Delivery | None]:
        """Hold copies of deliveries from these lanes. Return each copy, None if it failed.

        Raises `Unavailable`, `ConfigurationError`.
        """
        await self._listen()
        loop = asyncio.get_running_loop()
        numbers = [str(next(self._numbers)) for _ in held]
        copies: list[asyncio.Future[Fence]] = [loop.create_future() for _ in held]
        self._expected.update(zip(numbers, copies, strict=True))
        try:
            async with self._connection.answering():
                # An alarm blocks connections that publish, so this one must not.
                refused = await self._broker.send(
                    [
                        self._sending(*each, number)
                        for each, number in zip(held, numbers, strict=True)
                    ]
                )
                arriving = [copy for at, copy in enumerate(copies) if at not in refused]
                if arriving:
                    await asyncio.wait(arriving)
        finally:
            for number in numbers:
                self._expected.pop(number, None)
        return [
            Delivery(delivery.message, delivery.queue, copy.result(), delivery.count)
            if copy.done() and not copy.cancelled()
            else None
            for (delivery, _), copy in zip(held, copies, strict=True)
        ]

    def sort(self, epoch: int, arrival: Arrival) -> None:
        """Note the fence of an awaited copy. Another one goes back to its lane."""
        copy = self._expected.pop(str(arrival.headers.get(NUMBER)), None)
        if copy is not None and not copy.done():
            copy.set_result((epoch, arrival.tag, self.source))
        else:
            self._unwanted.append(arrival.tag)

    async def rest(self, _busy: Callable[[], bool]) -> None:
        """Do nothing: all copies are held for tasks that run."""

    async def _listen(self) -> None:
        """Open the channel and consume, unless it does so already. Send unwanted copies back."""
        from pamqp.commands import Basic

        await self.open()
        channel = self._channel
        assert channel is not None
        async with self._connection.answering():
            if not self.consumes:
                self._active["copies"] = 0
                try:
                    await channel.call(Basic.Qos(prefetch_count=0), self._consume_method("copies"))
                except BaseException:
                    self._active.clear()
                    raise
        unwanted, self._unwanted = self._unwanted, []
        await self._acknowledge([], unwanted)

    def _sending(self, delivery: Delivery, lane: str, number: str) -> Sending:
        from qtasks_rabbitmq.channel import Sending

        message = delivery.message
        body = encode_message(message) if isinstance(message, TaskMessage) else message.data
        headers = {HOLDER: self._holder, NUMBER: number, COUNT: str(delivery.count or 1)}
        return Sending(body, lane, self._names.handed, number, headers)

    def _back(self, tags: Iterable[int]) -> Iterator[Frame]:
        """Dead-letter: if it were returned to this queue, it would come back at once."""
        from pamqp.commands import Basic

        for tag in tags:
            yield Basic.Nack(delivery_tag=tag, requeue=False)

    def _drop(self, epoch: int) -> None:
        if epoch == self._epoch:
            self._unwanted.clear()
            for copy in self._expected.values():
                copy.cancel()
        super()._drop(epoch)
