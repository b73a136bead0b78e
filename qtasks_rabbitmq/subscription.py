"""A subscription on RabbitMQ: a lane per queue, and a lane for delayed tasks without a queue."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from qtasks_core import LOST, Delivery, Outcome, Settlement, Subscription
from qtasks_core.errors import Closed, ConfigurationError, Unavailable
from qtasks_core.receivers import Shielded
from qtasks_core.together import together
from qtasks_rabbitmq.connection import Connection
from qtasks_rabbitmq.delays import left_of
from qtasks_rabbitmq.lane import Lane
from qtasks_rabbitmq.parcel import Dispatcher, Parcel
from qtasks_rabbitmq.topology import Names, declare, namespace_methods, queue_methods

if TYPE_CHECKING:
    from qtasks_rabbitmq.channel import Arrival, Channel

LINGER = 0.5
"""Seconds that a delivery waits for `receive` before another receiver gets it."""
STRAYS_AT_ONCE = 100

logger = logging.getLogger("qtasks.rabbitmq")


class RabbitMQSubscription(Subscription):
    """Consumers on their own connection, with one channel per queue."""

    def __init__(
        self,
        broker: Dispatcher,
        names: Names,
        url: str,
        queues: Mapping[str, int],
        left: Callable[[RabbitMQSubscription], None],
    ) -> None:
        self._left = left
        """Called once the subscription holds nothing any more, and cannot get anything."""
        self._names = names
        self._connection = Connection(url, "receiver", broker.heartbeat, self._set_up)
        self._bell = asyncio.Event()
        self._lanes = {
            queue: Lane(queue, names.queue(queue), most, self._connection, broker, self._on_arrival)
            for queue, most in queues.items()
        }
        self._strays = Strays(
            next(iter(queues), ""), names, self._connection, broker, self._on_arrival
        )
        self._by_source: dict[str, Lane] = {
            **{names.queue(queue): lane for queue, lane in self._lanes.items()},
            names.lost: self._strays,
        }
        self._fresh: set[str] = set()
        """Queues that were declared on this connection and have no channel yet."""
        self._preparing: Shielded[Exception | None] = Shielded()
        self._receiving = False
        self._idle: asyncio.TimerHandle | None = None
        self._resting: asyncio.Task[None] | None = None
        self._open = True

    async def open(self) -> None:
        """Connect. Raises `Unavailable`, `ConfigurationError`."""
        for lane in self._by_source.values():
            await lane.open()

    async def receive(self, wanted: Mapping[str, int], limit: int) -> list[Delivery]:
        self._receiving = True
        try:
            while self._open:
                self._bell.clear()
                failed = None
                if self._needing(wanted):
                    failed = await self._preparing.run(partial(self._prepare, dict(wanted)))
                # Return the deliveries of one queue even if another queue's channel cannot be
                # opened.
                if deliveries := self._take(wanted, limit):
                    return deliveries
                if failed is not None:
                    raise failed
                if not self._needing(wanted):
                    await self._bell.wait()
            raise Closed("the subscription is closed")
        finally:
            self._receiving = False
            self._rest_later()

    def _take(self, wanted: Mapping[str, int], limit: int) -> list[Delivery]:
        deliveries: list[Delivery] = []
        for queue, most in wanted.items():
            ready = self._lanes[queue].ready
            for _ in range(min(most, limit - len(deliveries), len(ready))):
                deliveries.append(ready.popleft()[0])
        return deliveries

    def _needing(self, wanted: Mapping[str, int]) -> list[tuple[Lane, int]]:
        """Return the lanes that have work to do, and how many deliveries are wanted of each."""
        all_wanted = [(self._lanes[queue], most) for queue, most in wanted.items()]
        all_wanted.append((self._strays, STRAYS_AT_ONCE))
        return [(lane, most) for lane, most in all_wanted if lane.needs(most)]

    async def _prepare(self, wanted: Mapping[str, int]) -> Exception | None:
        """Prepare the lanes and return the first error. A failed lane does not stop the others."""
        failed: Exception | None = None
        for lane, most in self._needing(wanted):
            try:
                await lane.prepare(most)
            except (Unavailable, ConfigurationError) as error:
                failed = failed or error
                if not self._connection.open:
                    break  # all other lanes would wait for the same server
        return failed

    def _on_arrival(self) -> None:
        self._bell.set()
        if not self._receiving:
            self._rest_later()

    def _rest_later(self) -> None:
        """Make sure that unclaimed deliveries do not wait here while other receivers are idle."""
        if self._idle is None and self._open and self._has_ready():
            loop = asyncio.get_running_loop()
            self._idle = loop.call_later(LINGER, self._rest_unless_busy)

    def _rest_unless_busy(self) -> None:
        self._idle = None
        if self._has_ready() and not self._receiving and self._resting is None:
            self._resting = asyncio.create_task(self._rest())

    async def _rest(self) -> None:
        try:
            await together([lane.rest(lambda: self._receiving) for lane in self._lanes.values()])
        except (Unavailable, ConfigurationError) as error:
            logger.warning("unclaimed deliveries could not be passed on to others: %s", error)
        finally:
            self._resting = None
            self._rest_later()

    def _has_ready(self) -> bool:
        return any(lane.ready for lane in self._lanes.values())

    async def settle(self, settlements: Sequence[Settlement]) -> list[Outcome]:
        of_lane: dict[str, list[int]] = {}
        for at, settlement in enumerate(settlements):
            of_lane.setdefault(settlement.delivery.queue, []).append(at)
        outcomes = [LOST] * len(settlements)
        known = {queue: which for queue, which in of_lane.items() if queue in self._lanes}
        answers = await together(
            [
                self._lanes[queue].settle([settlements[at] for at in which])
                for queue, which in known.items()
            ]
        )
        for which, answer in zip(known.values(), answers, strict=True):
            for at, outcome in zip(which, answer, strict=True):
                outcomes[at] = outcome
        if not self._open and not self._holds():
            await self._leave()
        return outcomes

    async def extend(self, deliveries: Sequence[Delivery]) -> list[Delivery | None]:
        lanes = {d.queue: self._lanes[d.queue] for d in deliveries if self._mine(d)}
        await together([lane.probe() for lane in lanes.values()])
        return [delivery if self._mine(delivery) else None for delivery in deliveries]

    def _mine(self, delivery: Delivery) -> bool:
        lane = self._lanes.get(delivery.queue)
        return lane is not None and lane.mine(delivery)

    def _holds(self) -> bool:
        return any(lane.held for lane in self._lanes.values())

    async def let_go(self, queues: Collection[str]) -> None:
        """Give up the channels of deleted queues. `receive` opens new ones."""
        await together([lane.let_go() for queue, lane in self._lanes.items() if queue in queues])

    async def close(self) -> None:
        self._open = False
        self._bell.set()
        if self._idle is not None:
            self._idle.cancel()
        await self._preparing.finish()
        if self._resting is not None:
            await asyncio.wait({self._resting})
        for lane in self._by_source.values():
            if not lane.lost:
                try:
                    await lane.give_back()
                except Unavailable as error:
                    self._connection.discard(str(error))
        if not self._holds():
            await self._leave()

    async def leave(self) -> None:
        """Close, and return all held deliveries to the server. Idempotent."""
        await self.close()
        await self._leave()

    async def _leave(self) -> None:
        try:
            # The answer proves that the earlier acknowledgements have arrived.
            await together([lane.probe() for lane in self._lanes.values()])
        except Unavailable as error:
            self._connection.discard(str(error))
        await self._connection.close()
        self._left(self)

    async def _set_up(self, channel: Channel, source: str, version: tuple[int, ...]) -> None:
        """Declare the needed queues, and start the lane of a new channel."""
        if not source:
            methods = namespace_methods(self._names)
            for queue in self._lanes:
                methods += queue_methods(self._names, queue, version)
            await declare(channel, self._names, methods)
            self._fresh = set(self._by_source)
            return
        lane = self._by_source[source]
        lane.begin(channel)
        if source in self._fresh:
            self._fresh.discard(source)
        elif lane is self._strays:
            await declare(channel, self._names, namespace_methods(self._names))
        else:
            await declare(channel, self._names, queue_methods(self._names, lane.queue, version))


class Strays(Lane):
    """Takes delayed tasks whose queue was deleted, and sends them to a queue."""

    def __init__(
        self,
        queue: str,
        names: Names,
        connection: Connection,
        broker: Dispatcher,
        arrived: Callable[[], None],
    ) -> None:
        super().__init__(queue, names.lost, STRAYS_AT_ONCE, connection, broker, arrived)
        self._names = names

    def sort(self, epoch: int, arrival: Arrival) -> None:
        """Send a task on to its queue. The queue is declared again if it is missing."""
        queue = self._names.of(arrival.routing_key)
        try:
            rest = left_of(self._names, arrival.headers)
        except ValueError as error:
            logger.warning("a delayed task with properties from outside: %s", error)
            rest = 0.0
        if queue is None:
            # QTasks did not write it, so it becomes a dead letter in this queue.
            queue = self.queue
        logger.warning("a delayed task found the queue %s deleted; it is sent there again", queue)
        self.send_on_later(arrival.tag, Parcel(queue, rest, "", arrival.body))
