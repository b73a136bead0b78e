"""A broker on RabbitMQ: quorum queues, confirmed publishes, consumers with a local buffer."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from qtasks_core import (
    DONE,
    Broker,
    Command,
    Guarantees,
    Outcome,
    QueueDepth,
    Subscription,
    TaskMessage,
)
from qtasks_core.batches import split
from qtasks_core.errors import Closed, ConfigurationError, Unavailable
from qtasks_core.schemas import RETRIES_IN_TWO_STEPS
from qtasks_core.together import together
from qtasks_core.transactions import refuse_transaction
from qtasks_rabbitmq.connection import (
    CONSUMER_TIMEOUT,
    HARD_LIMIT,
    MOST_AT_ONCE,
    MOST_BYTES_AT_ONCE,
    Connection,
)
from qtasks_rabbitmq.control import (
    Listeners,
    announce_lanes,
    broadcast,
    control_connection,
    depth,
    purge,
)
from qtasks_rabbitmq.delays import ladder_methods, levels_for, route
from qtasks_rabbitmq.lanes import LaneName
from qtasks_rabbitmq.migration import migrated
from qtasks_rabbitmq.parcel import COUNT, Parcel, parcel_of
from qtasks_rabbitmq.servers import HEARTBEAT, LEASE_TIME, SILENCE, servers_of
from qtasks_rabbitmq.subscription import RabbitMQSubscription
from qtasks_rabbitmq.topology import (
    STRICT,
    USUAL,
    Names,
    declare,
    namespace_methods,
    queue_methods,
)

if TYPE_CHECKING:
    from qtasks_rabbitmq.channel import Channel, Sending

logger = logging.getLogger("qtasks.rabbitmq")

NOTICE = 1.0
"""Seconds within which the server tells a queue's consumers that the queue was deleted.

On an idle machine it takes some hundredths of a second.
"""


_TIMEOUT = (
    f"AMQP does not tell this server's consumer_timeout: if it is below {CONSUMER_TIMEOUT / 60:g} "
    "minutes, it takes back the message of a task that runs longer; raise it, or use RabbitMQ 4.3"
)


def _advice(connection: Connection | None) -> tuple[str, ...]:
    """Return what an operator should look at, once the server's version is known."""
    if connection is None or not connection.version or connection.version >= STRICT:
        return ()
    return (_TIMEOUT,)


class RabbitMQBroker(Broker):
    """Moves messages through a RabbitMQ server. `lease` is in seconds, at least 3.

    The lease sets the heartbeat, by which the server notices a dead or stopped receiver. Raises
    `ConfigurationError` if the URL or the lease is wrong.
    """

    driver_loggers = ("aio_pika", "aiormq")

    def __init__(self, url: str = "amqp://localhost", *, lease: float = 30.0) -> None:
        self._lease = LEASE_TIME.checked("lease", lease)
        servers_of(url)
        self._url = url
        self.heartbeat = int(lease // SILENCE)
        """Seconds between the heartbeats of its receivers."""
        self._names: Names | None = None
        self._publishing: Connection | None = None
        self._control: Connection | None = None
        self._listeners: Listeners | None = None
        self._version: tuple[int, ...] = ()
        self._declared: set[LaneName] = set()
        self._levels = 0
        self._declaring = asyncio.Lock()
        self._subscriptions: set[RabbitMQSubscription] = set()

    @property
    def guarantees(self) -> Guarantees:
        return Guarantees(
            part="RabbitMQBroker",
            server=self._publishing.server if self._publishing is not None else "",
            survives="machine crash",
            durability="quorum queues: confirmed when a majority has written and synced its log",
            lease=self._lease,
            largest=(self._publishing and self._publishing.largest) or HARD_LIMIT,
            order="queue",
            settle_confirmed=False,
            counts_deliveries=True,
            priorities=True,
            notes=(
                "an acknowledgement has no reply: a crash of the server may undo it",
                RETRIES_IN_TWO_STEPS,
                "`depth` does not know how many messages are in flight: AMQP does not tell it",
                "before RabbitMQ 4.3, each used priority is a queue of the server, and running "
                "receivers notice a new one after 10 s if its announcement is lost; from 4.3 on, a "
                "released message comes first, whatever its priority",
                "all queues share the queues of delayed messages: `depth` knows the number of "
                "delayed messages only if it is 0 for all of them; `purge` reads all of them, and "
                "none of them becomes due meanwhile",
                "a crash of the server while it moves a delayed message delays that by 3 minutes, "
                "after which the server moves it again "
                "(dead_letter_worker_publisher_confirm_timeout), or delivers it twice",
                "before RabbitMQ 4.3, a task that runs for long is handed over to a queue of its "
                "worker before the server's consumer_timeout takes it back: the user needs the "
                "right to create that queue, and a timeout below the default of 30 minutes is "
                "known only once it has struck",
            ),
            advice=_advice(self._publishing),
        )

    async def start(self, namespace: str) -> None:
        self._names = Names(namespace)
        if self._publishing is None:
            self._publishing = Connection(self._url, "publisher", HEARTBEAT, self._set_up)
            self._control = control_connection(self._url, "control", HEARTBEAT)
            self._listeners = Listeners(self._url, HEARTBEAT, self._look_for_lanes)
        await self._publishing.channel()

    async def stop(self) -> None:
        try:
            await together([subscription.leave() for subscription in self._subscriptions])
        finally:
            listeners, self._listeners = self._listeners, None
            if listeners is not None:
                await listeners.stop()
            connections = (self._control, self._publishing)
            self._control = self._publishing = None
            await together([each.close() for each in connections if each is not None])

    async def publish(
        self, messages: Sequence[TaskMessage], transaction: object | None = None
    ) -> list[Outcome]:
        if transaction is not None:
            refuse_transaction(self)
        return await self.dispatch([parcel_of(message) for message in messages])

    async def dispatch(self, parcels: Sequence[Parcel]) -> list[Outcome]:
        """Publish encoded messages. Each is then durable on the server, or refused."""
        outcomes = [DONE] * len(parcels)
        sizes = (len(parcel.body) for parcel in parcels)
        for part in split(sizes, MOST_AT_ONCE, MOST_BYTES_AT_ONCE):
            refused = await self._dispatch(parcels, range(len(parcels))[part])
            if refused:
                # A queue may have been deleted after its declaration, so declare it and try again.
                gone = {self._lane(parcels[at]) for at in refused if parcels[at].delay <= 0}
                if gone:
                    await self._let_go(gone)
                self._declared.difference_update(self._lane(parcels[at]) for at in refused)
                self._levels = 0
                refused = await self._dispatch(parcels, list(refused))
            for at, reason in refused.items():
                outcomes[at] = Outcome("refused", reason)
        return outcomes

    async def send(self, sendings: Sequence[Sending]) -> dict[int, str]:
        """Publish to exchanges that exist. Return the refused messages, by index, with why."""
        return await self._started()[1].publish(sendings)

    async def _dispatch(self, parcels: Sequence[Parcel], which: Sequence[int]) -> dict[int, str]:
        """Publish the parcels at these positions in one write. Return the refused ones and why."""
        names, publishing = self._started()
        channel = await publishing.channel()
        sendings: list[Sending] = []
        levels = 0
        for at in which:
            sending, top = _address(names, parcels[at], self._by_property)
            sendings.append(sending)
            levels = max(levels, levels_for(top))
        lanes = {self._lane(parcels[at]) for at in which}
        try:
            async with publishing.answering():
                created = await self._declare(channel, lanes, levels)
        except Unavailable:
            publishing.discard("the server did not answer in time", only=channel)
            raise
        if any(priority != USUAL for _, priority in created):
            await self._announce()
        refused = await publishing.publish(sendings)
        return {which[index]: reason for index, reason in refused.items()}

    def _lane(self, parcel: Parcel) -> LaneName:
        return parcel.queue, USUAL if self._by_property else parcel.priority

    @property
    def _by_property(self) -> bool:
        """Whether the server itself delivers a queue by the priority of its messages."""
        return self._version >= STRICT

    async def _declare(
        self, channel: Channel, lanes: Iterable[LaneName], levels: int
    ) -> list[LaneName]:
        """Declare what this connection has not declared yet, and return those lanes."""
        names, _ = self._started()
        async with self._declaring:
            missing = [lane for lane in lanes if lane not in self._declared]
            methods = [
                method
                for queue, priority in missing
                for method in queue_methods(names, queue, self._version, priority)
            ]
            if levels > self._levels:
                methods += ladder_methods(names, range(self._levels, levels), self._version)
            if methods:
                await declare(channel, names, methods)
                self._declared.update(missing)
                self._levels = max(self._levels, levels)
            return missing

    async def _announce(self) -> None:
        """Make all receivers look for new lanes. Those that do not hear it look a little later."""
        names, control, _ = self._controlling()
        self._look_for_lanes()
        try:
            async with asyncio.timeout(NOTICE):
                await announce_lanes(control, names)
        except (TimeoutError, Unavailable, ConfigurationError) as error:
            logger.debug("new lanes could not be announced: %r", error)

    def _look_for_lanes(self) -> None:
        for subscription in self._subscriptions:
            subscription.look_for_lanes()

    async def _let_go(self, lanes: Collection[LaneName]) -> None:
        """Make all consumers leave deleted queues before the queues are created again.

        The server tells consumers of a deletion a little later. If a quorum queue exists again by
        then, its old consumers are not told. They stay, and the server drops messages on the way to
        them (seen on RabbitMQ 3.10). Our consumers leave at once. The sleep is for consumers of
        other processes.
        """
        names, _ = self._started()
        sources = {names.queue(*lane) for lane in lanes}
        await together([subscription.let_go(sources) for subscription in self._subscriptions])
        await asyncio.sleep(NOTICE)

    async def subscribe(self, queues: Mapping[str, int]) -> Subscription:
        names = self._started()[0]
        subscription = RabbitMQSubscription(
            self, names, self._url, queues, self._subscriptions.discard
        )
        await subscription.open()
        self._subscriptions.add(subscription)
        return subscription

    async def depth(self, queue: str) -> QueueDepth:
        names, control, _ = self._controlling()
        return await depth(control, names, queue)

    async def purge(self, queue: str) -> int:
        names, _, _ = self._controlling()
        return await purge(self._url, HEARTBEAT, names, queue)

    async def broadcast(self, command: Command) -> None:
        names, control, _ = self._controlling()
        await broadcast(control, names, command)

    def commands(self) -> AsyncIterator[Command]:
        names, _, listeners = self._controlling()
        return listeners.follow(names)

    async def migrate(self, namespace: str) -> list[str]:
        return await migrated(self._url, HEARTBEAT, namespace)

    async def _set_up(self, channel: Channel, _purpose: str, version: tuple[int, ...]) -> None:
        """Declare on a new connection everything that all queues need."""
        self._version = version
        self._declared.clear()
        self._levels = 0
        names, _ = self._started()
        await declare(channel, names, namespace_methods(names))

    def _started(self) -> tuple[Names, Connection]:
        if self._names is None or self._publishing is None:
            raise Closed("RabbitMQBroker is not started")
        return self._names, self._publishing

    def _controlling(self) -> tuple[Names, Connection, Listeners]:
        if self._names is None or self._control is None or self._listeners is None:
            raise Closed("RabbitMQBroker is not started")
        return self._names, self._control, self._listeners


def _address(names: Names, parcel: Parcel, by_property: bool) -> tuple[Sending, int]:
    """Return how to send a parcel, and the level at which it enters the ladder (-1: none)."""
    from qtasks_rabbitmq.channel import Sending

    if by_property:
        queue, priority = names.queue(parcel.queue), parcel.priority
    else:
        queue, priority = names.queue(parcel.queue, parcel.priority), None
    if parcel.delay <= 0:
        counted = {COUNT: str(parcel.count)} if parcel.count else None
        return Sending(parcel.body, queue, "", parcel.message_id, counted, priority), -1
    top, headers = route(parcel.delay)
    return Sending(parcel.body, queue, names.delay, parcel.message_id, headers, priority), top
