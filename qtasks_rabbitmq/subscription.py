"""A subscription on RabbitMQ: the lanes of its queues, and one of delayed tasks without a queue."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from msgspec.structs import replace

from qtasks_core import LOST, Delivery, Outcome, Settlement, Subscription
from qtasks_core.errors import Closed, ConfigurationError, Unavailable
from qtasks_core.receivers import Shielded
from qtasks_core.together import together
from qtasks_rabbitmq.connection import Connection
from qtasks_rabbitmq.delays import left_of
from qtasks_rabbitmq.handed import Handed
from qtasks_rabbitmq.lane import Lane
from qtasks_rabbitmq.lanes import Lanes, find_lanes
from qtasks_rabbitmq.parcel import Dispatcher, lane_of
from qtasks_rabbitmq.topology import USUAL, Names, declare, namespace_methods

if TYPE_CHECKING:
    from pamqp.base import Frame

    from qtasks_rabbitmq.channel import Arrival, Channel

LINGER = 0.5
"""Seconds that a delivery waits for `receive` before another receiver gets it."""
STRAYS_AT_ONCE = 100
LOOK = 10.0
"""Seconds after which a subscription looks for new lanes, in case their announcement was lost."""
MOST_COPIES = 10_000
"""How many deliveries, the newest that were handed over, are known by their old fence too."""
RECOUNT = 0.1
"""Seconds after which messages that were counted but have not come are counted again."""

logger = logging.getLogger("qtasks.rabbitmq")


class RabbitMQSubscription(Subscription):
    """Consumers on their own connection, with one channel per lane."""

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
        self._broker = broker
        self._capacities = dict(queues)
        usual = {queue: self._new_lane(queue, USUAL) for queue in queues}
        self._lanes = {queue: Lanes(lane, self._connection) for queue, lane in usual.items()}
        self._look_at = 0.0
        """The loop's time from which to look for new lanes."""
        self._strays = Strays(
            next(iter(queues), ""), names, self._connection, broker, self._on_arrival
        )
        self._by_source: dict[str, Lane] = {
            names.lost: self._strays,  # the others are bound to what is declared with it
            **{lane.source: lane for lane in usual.values()},
        }
        self._handed = Handed(names, self._connection, broker, self._on_arrival)
        self._copies: dict[tuple[int, int, str], Delivery] = {}
        """The fence of a delivery that was handed over -> its copy."""
        self._may_hand_over = True
        """Whether the user has the right to create what it needs."""
        self._handing: Shielded[None] = Shielded()
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
        await self._look()

    def _new_lane(self, queue: str, priority: int) -> Lane:
        return Lane(
            queue,
            self._names,
            self._names.queue(queue, priority),
            self._capacities[queue],
            self._connection,
            self._broker,
            self._on_arrival,
            priority,
        )

    async def receive(self, wanted: Mapping[str, int], limit: int) -> list[Delivery]:
        self._receiving = True
        try:
            while self._open:
                self._bell.clear()
                failed = None
                # Consumers of several lanes are opened in one step and cancelled in another.
                while failed is None and self._needs(wanted):
                    failed = await self._preparing.run(partial(self._prepare, dict(wanted)))
                # Return the deliveries of one queue even if another queue's channel cannot be
                # opened.
                if deliveries := self._take(wanted, limit):
                    return deliveries
                if failed is not None:
                    raise failed
                if not self._needs(wanted):
                    await self._arrivals(wanted)
            raise Closed("the subscription is closed")
        finally:
            self._receiving = False
            self._rest_later()

    async def _arrivals(self, wanted: Mapping[str, int]) -> None:
        """Wait until something arrives, or until it is time to look for lanes or messages."""
        now = asyncio.get_running_loop().time()
        counted = [self._lanes[queue] for queue in wanted if self._lanes[queue].expected]
        until = min(self._look_at, now + RECOUNT) if counted else self._look_at
        try:
            async with asyncio.timeout_at(until):
                await self._bell.wait()
        except TimeoutError:
            for lanes in counted:
                lanes.count_again()

    def _take(self, wanted: Mapping[str, int], limit: int) -> list[Delivery]:
        deliveries: list[Delivery] = []
        for queue, most in wanted.items():
            deliveries += self._lanes[queue].take(min(most, limit - len(deliveries)))
        return deliveries

    def _needs(self, wanted: Mapping[str, int]) -> bool:
        """Return whether `_prepare` has something to do."""
        due = self._look_at <= asyncio.get_running_loop().time()
        return due or bool(self._needing(wanted))

    def _needing(self, wanted: Mapping[str, int]) -> list[tuple[Lane | Lanes, int]]:
        """Return the queues that have work to do, and how many deliveries are wanted of each."""
        all_wanted: list[tuple[Lane | Lanes, int]]
        all_wanted = [(self._lanes[queue], most) for queue, most in wanted.items()]
        all_wanted.append((self._strays, STRAYS_AT_ONCE))
        return [(lanes, most) for lanes, most in all_wanted if lanes.needs(most)]

    async def _prepare(self, wanted: Mapping[str, int]) -> Exception | None:
        """Prepare the queues and return the first error. A failed one does not stop the others."""
        failed: Exception | None = None
        if self._look_at <= asyncio.get_running_loop().time():
            try:
                await self._look()
            except (Unavailable, ConfigurationError) as error:
                failed = error
        for lanes, most in self._needing(wanted):
            try:
                await lanes.prepare(most)
            except (Unavailable, ConfigurationError) as error:
                failed = failed or error
                if not self._connection.open:
                    break  # all other lanes would wait for the same server
        return failed

    def look_for_lanes(self) -> None:
        """Make `receive` look for new lanes."""
        self._look_at = 0.0
        self._bell.set()

    async def _look(self) -> None:
        """Receive from lanes that were created since the last look."""
        looked_at = self._look_at = asyncio.get_running_loop().time() + LOOK
        try:
            async with self._connection.asking() as channel:
                found = await find_lanes(channel, self._names, list(self._lanes))
            for queue, priority in found:
                if self._names.queue(queue, priority) not in self._by_source:
                    lane = self._new_lane(queue, priority)
                    await self._lanes[queue].add(priority, lane)
                    self._by_source[lane.source] = lane
        except BaseException:
            if self._look_at == looked_at:
                self._look_at = 0.0
            raise

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
            lanes = list(self._by_source.values())
            await together([lane.rest(lambda: self._receiving) for lane in lanes])
        except (Unavailable, ConfigurationError) as error:
            logger.warning("unclaimed deliveries could not be passed on to others: %s", error)
        finally:
            self._resting = None
            self._rest_later()

    def _has_ready(self) -> bool:
        return any(lane.ready for lane in self._by_source.values())

    async def settle(self, settlements: Sequence[Settlement]) -> list[Outcome]:
        if self._copies:
            settlements = [replace(s, delivery=self._newest(s.delivery)) for s in settlements]
        of_lane: dict[str, list[int]] = {}
        for at, settlement in enumerate(settlements):
            of_lane.setdefault(settlement.delivery.fence[2], []).append(at)
        outcomes = [LOST] * len(settlements)
        answers = await together(
            [
                self._by_source[source].settle([settlements[at] for at in which])
                for source, which in of_lane.items()
            ]
        )
        for which, answer in zip(of_lane.values(), answers, strict=True):
            for at, outcome in zip(which, answer, strict=True):
                outcomes[at] = outcome
        if not self._open and not self._holds():
            await self._leave()
        return outcomes

    async def extend(self, deliveries: Sequence[Delivery]) -> list[Delivery | None]:
        newest = [self._newest(delivery) for delivery in deliveries]
        lanes = {self._by_source[d.fence[2]] for d in newest if self._mine(d)}
        await together([lane.probe() for lane in lanes])
        if self._may_hand_over and (long := [each for each in newest if self._is_long(each)]):
            await self._handing.run(partial(self._hand_over, long))
            newest = [self._newest(delivery) for delivery in newest]
        return [delivery if self._mine(delivery) else None for delivery in newest]

    def _newest(self, delivery: Delivery) -> Delivery:
        """Return what is held instead of a delivery: the copy of it, if it was handed over."""
        while (copy := self._copies.get(delivery.fence)) is not None:
            delivery = copy
        return delivery

    def _is_long(self, delivery: Delivery) -> bool:
        """Return whether the server would soon take a delivery back."""
        return self._mine(delivery) and self._by_source[delivery.fence[2]].is_long(delivery)

    async def _hand_over(self, deliveries: Sequence[Delivery]) -> None:
        """Hold copies instead of deliveries. If that fails, the deliveries are still held."""
        handed = self._handed
        try:
            if handed.source not in self._by_source:
                # Not while its channel is opened: without the right to do so, that would cost the
                # connection, and so all leases.
                async with self._connection.asking() as channel:
                    methods = handed.methods(self._connection.version)
                    await declare(channel, self._names, methods)
                    await channel.registered()
                self._by_source[handed.source] = handed
                self._fresh.add(handed.source)
            copies = await handed.take_over([(each, self._lane_of(each)) for each in deliveries])
        except ConfigurationError as error:
            self._may_hand_over = False
            logger.warning("the server takes back tasks beyond its consumer_timeout: %s", error)
            return
        except Unavailable as error:
            logger.warning("deliveries of long tasks are not handed over yet: %s", error)
            return
        done = [(old, new) for old, new in zip(deliveries, copies, strict=True) if new is not None]
        while len(self._copies) + len(done) > MOST_COPIES:
            del self._copies[next(iter(self._copies))]
        self._copies.update((old.fence, new) for old, new in done)
        of_lane: dict[str, list[Delivery]] = {}
        for old, _ in done:
            of_lane.setdefault(old.fence[2], []).append(old)
        await together(
            [self._by_source[source].hand_over(olds) for source, olds in of_lane.items()]
        )

    def _lane_of(self, delivery: Delivery) -> str:
        """Return the lane from which a delivery or its first copy came."""
        lane = self._names.queue(delivery.queue, lane_of(delivery.message))
        return lane if lane in self._by_source else self._names.queue(delivery.queue)

    def _mine(self, delivery: Delivery) -> bool:
        return self._by_source[delivery.fence[2]].mine(delivery)

    def _holds(self) -> bool:
        return any(lane.held for lane in self._by_source.values())

    async def let_go(self, sources: Collection[str]) -> None:
        """Give up the channels of deleted lanes. `receive` opens new ones."""
        lanes = [lane for source, lane in self._by_source.items() if source in sources]
        await together([lane.let_go() for lane in lanes])

    async def close(self) -> None:
        self._open = False
        self._bell.set()
        if self._idle is not None:
            self._idle.cancel()
        await self._preparing.finish()
        await self._handing.finish()
        if self._resting is not None:
            await asyncio.wait({self._resting})
        for lane in list(self._by_source.values()):
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
            await together([lane.probe() for lane in self._by_source.values()])
        except Unavailable as error:
            self._connection.discard(str(error))
        await self._connection.close()
        self._left(self)

    async def _set_up(self, channel: Channel, source: str, version: tuple[int, ...]) -> None:
        """Declare the needed queues, and start the lane of a new channel."""
        if not source:
            methods = [m for lane in self._by_source.values() for m in lane.methods(version)]
            fresh = set(self._by_source)
            await declare(channel, self._names, methods)
            self._fresh = fresh
            return
        lane = self._by_source[source]
        lane.begin(channel)
        if source in self._fresh:
            self._fresh.discard(source)
        else:
            await declare(channel, self._names, lane.methods(version))


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
        super().__init__(queue, names, names.lost, STRAYS_AT_ONCE, connection, broker, arrived)

    def methods(self, _version: tuple[int, ...]) -> list[Frame]:
        """Return the methods that declare the queue."""
        return namespace_methods(self._names)

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
        self.send_on_later(arrival, queue, rest)
