"""A broker on RabbitMQ: quorum queues, confirmed publishes, push consumers with a local buffer."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from qtasks_core import (
    DONE,
    LOST,
    Ack,
    Broker,
    Delivery,
    Guarantees,
    Outcome,
    Retry,
    Settlement,
    Subscription,
    TaskMessage,
)
from qtasks_core.errors import Closed, ConfigurationError, Unavailable, refuse_transaction
from qtasks_core.recent import Recent
from qtasks_core.shielded import Shielded
from qtasks_core.urls import split
from qtasks_core.wire import decode_message, encode_message
from qtasks_rabbitmq.connection import Connection
from qtasks_rabbitmq.delays import ladder_methods, ladder_queues, levels_for, rest_of, route
from qtasks_rabbitmq.topology import Names, declare, namespace_methods, queue_methods

if TYPE_CHECKING:
    from pamqp.base import Frame

    from qtasks_rabbitmq.channel import Channel, Sending

SILENCE = 3
"""Heartbeats after which the server has surely let go of a receiver that fell silent."""
MOST_AT_ONCE = 1000
MOST_BYTES_AT_ONCE = 4 * 2**20
"""What is written before the server's confirms are awaited."""
LINGER = 0.5
"""Seconds that a delivery waits for a call of `receive` before another receiver gets it."""
COUNT = "qtasks-count"
"""Header: deliveries of earlier copies of a message."""
UNKNOWN = Outcome("unknown", "RabbitMQ does not answer an acknowledgement")
TWICE = Outcome("unknown", "the retry is published, but the lease of the old delivery was lost")

log = logging.getLogger(__name__)
epochs = count(1)
"""Numbers the channels of all subscriptions; a fence is (epoch, delivery tag)."""


class Parcel(Struct, frozen=True, gc=False):
    """An encoded message, the queue it is for, and how long it has to wait (seconds)."""

    queue: str
    delay: float
    message_id: str
    body: bytes
    count: int = 0
    """How often it was delivered before, where the server cannot know."""


class RabbitMQBroker(Broker):
    """Moves messages through a RabbitMQ server.

    `lease` (seconds, at least 3) becomes the heartbeat by which the server notices a dead or
    stopped receiver. Raises `ConfigurationError` when it is shorter.
    """

    driver_loggers = ("aio_pika", "aiormq")

    def __init__(self, url: str = "amqp://localhost", *, lease: float = 30.0) -> None:
        if not lease >= SILENCE:
            raise ConfigurationError(
                f"lease={lease:g} is too short for RabbitMQ, whose heartbeats are whole seconds: "
                f"it must be at least {SILENCE}"
            )
        split(url)
        self._url = url
        self._lease = lease
        self.heartbeat = int(lease // SILENCE)
        """Seconds between signs of life."""
        self._names: Names | None = None
        self._publishing: Connection | None = None
        self._version: tuple[int, ...] = ()
        self._declared: set[str] = set()
        self._levels = 0
        self._declaring = asyncio.Lock()
        self._subscriptions: list[RabbitMQSubscription] = []

    @property
    def guarantees(self) -> Guarantees:
        return Guarantees(
            part="RabbitMQBroker",
            server=self._publishing.server if self._publishing is not None else "",
            survives="machine crash",
            durability="quorum queues: confirmed when a majority has written and synced its log",
            lease=self._lease,
            order="queue",
            settle_confirmed=False,
            counts_deliveries=True,
            unsupported=("depth", "purge", "broadcast", "commands", "migrate"),
            notes=(
                "an acknowledgement has no reply: a crash of the server may undo it",
                "the server takes back what is held beyond its consumer_timeout (30 minutes)",
            ),
        )

    async def start(self, namespace: str) -> None:
        self._names = Names(namespace)
        if self._publishing is None:
            self._publishing = Connection(self._url, "publisher", self.heartbeat, self._set_up)
        await self._publishing.channel()

    async def stop(self) -> None:
        for subscription in list(self._subscriptions):
            await subscription.close()
            await subscription.end()
        publishing, self._publishing = self._publishing, None
        if publishing is not None:
            await publishing.close()

    async def publish(
        self, messages: Sequence[TaskMessage], transaction: object | None = None
    ) -> list[Outcome]:
        refuse_transaction(self, transaction)
        return await self.dispatch(
            [Parcel(m.queue, m.delay, m.uuid, encode_message(m)) for m in messages]
        )

    async def subscribe(self, queues: Mapping[str, int]) -> Subscription:
        names = self._started()[0]
        subscription = RabbitMQSubscription(self, names, self._url, queues)
        await subscription.open()
        self._subscriptions.append(subscription)
        return subscription

    async def dispatch(self, parcels: Sequence[Parcel]) -> list[Outcome]:
        """Publish encoded messages: each is durable with the server, or refused."""
        outcomes = [DONE] * len(parcels)
        for chunk in _chunks(parcels):
            refused = await self._dispatch(parcels, chunk)
            if refused:
                # A queue may have been deleted since it was declared: declare it and try again.
                self._declared.difference_update(parcels[at].queue for at in refused)
                self._levels = 0
                refused = await self._dispatch(parcels, list(refused))
            for at, reason in refused.items():
                outcomes[at] = Outcome("refused", reason)
        return outcomes

    async def _dispatch(self, parcels: Sequence[Parcel], which: Sequence[int]) -> dict[int, str]:
        """Publish some of the parcels in one write; return why the server refused which."""
        names, publishing = self._started()
        channel = await publishing.channel()
        sendings: list[Sending] = []
        levels = 0
        for at in which:
            sending, top = _address(names, parcels[at])
            sendings.append(sending)
            levels = max(levels, levels_for(top))
        try:
            async with publishing.answering():
                await self._declare(channel, {parcels[at].queue for at in which}, levels)
            await channel.registered()
            async with publishing.answering():
                refused = await channel.publish(sendings)
        except Unavailable:
            publishing.discard("the server did not confirm in time", only=channel)
            raise
        return {which[index]: reason for index, reason in refused.items()}

    async def _declare(self, channel: Channel, queues: Iterable[str], levels: int) -> None:
        """Declare queues and levels of the ladder where this connection has not yet."""
        names, _ = self._started()
        async with self._declaring:
            missing = [queue for queue in queues if queue not in self._declared]
            created = [names.queue(queue) for queue in missing]
            methods = [m for q in missing for m in queue_methods(names, q, self._version)]
            if levels > self._levels:
                above = range(self._levels, levels)
                created += ladder_queues(names, above)
                methods += ladder_methods(names, above)
            if methods:
                await declare(channel, methods, created)
                self._declared.update(missing)
                self._levels = max(self._levels, levels)

    async def _set_up(self, channel: Channel, version: tuple[int, ...]) -> None:
        """Declare on a new connection what every queue relies on."""
        self._version = version
        self._declared.clear()
        self._levels = 0
        await declare(channel, namespace_methods(self._started()[0]))

    def forget(self, subscription: RabbitMQSubscription) -> None:
        """Let go of a subscription that has ended."""
        if subscription in self._subscriptions:
            self._subscriptions.remove(subscription)

    def _started(self) -> tuple[Names, Connection]:
        if self._names is None or self._publishing is None:
            raise Closed("RabbitMQBroker is not started")
        return self._names, self._publishing


class RabbitMQSubscription(Subscription):
    """Consumers on a connection of their own, whose life is the lease of all they hold."""

    def __init__(
        self, broker: RabbitMQBroker, names: Names, url: str, queues: Mapping[str, int]
    ) -> None:
        self._broker = broker
        self._names = names
        self._queues = dict(queues)
        self._connection = Connection(url, "receiver", broker.heartbeat, self._set_up)
        self._channel: Channel | None = None
        self._epoch = 0
        self._held: dict[int, str] = {}
        """Delivery tags of this epoch, in order, and the consumers they came by."""
        self._settling: set[int] = set()
        """Those that a call is settling now."""
        self._ready: dict[str, deque[tuple[Delivery, bytes]]] = {q: deque() for q in queues}
        """What `receive` has not returned yet, with its bytes."""
        self._early: dict[int, Parcel] = {}
        """What came out of the ladder before its time, because its delay is longer than that."""
        self._settled = Recent()
        self._bell = asyncio.Event()
        self._preparing: Shielded[None] = Shielded()
        self._consumers: dict[str, str] = {}
        """Consumer tag -> queue, in this epoch; also of those that are being cancelled."""
        self._tags = count(1)
        self._active: dict[str, int] = {}
        """Consumer tag -> how many more deliveries the server may push through it."""
        self._receiving = False
        self._idle: asyncio.TimerHandle | None = None
        self._resting: asyncio.Task[None] | None = None
        self._open = True

    async def open(self) -> None:
        """Connect and begin to consume. Raises `Unavailable`, `ConfigurationError`."""
        self._channel = await self._connection.channel()

    async def receive(self, wanted: Mapping[str, int], limit: int) -> list[Delivery]:
        self._receiving = True
        try:
            while self._open:
                self._bell.clear()
                if self._lost() or self._early or self._missing(wanted):
                    await self._preparing.run(partial(self._prepare, dict(wanted)))
                    continue
                deliveries = self._take(wanted, limit)
                if deliveries:
                    return deliveries
                await self._bell.wait()
            raise Closed("the subscription is closed")
        finally:
            self._receiving = False
            self._rest_later()

    def _take(self, wanted: Mapping[str, int], limit: int) -> list[Delivery]:
        deliveries: list[Delivery] = []
        for queue, most in wanted.items():
            ready = self._ready[queue]
            for _ in range(min(most, limit - len(deliveries), len(ready))):
                deliveries.append(ready.popleft()[0])
        return deliveries

    def _missing(self, wanted: Mapping[str, int]) -> dict[str, int]:
        """Return what is wanted of each queue beyond what is here or may be pushed."""
        coming = dict.fromkeys(self._queues, 0)
        for tag, more in self._active.items():
            coming[self._consumers[tag]] += more
        missing = {
            queue: min(most, self._queues[queue]) - coming[queue] - len(self._ready[queue])
            for queue, most in wanted.items()
        }
        return {queue: lack for queue, lack in missing.items() if lack > 0}

    async def _prepare(self, wanted: Mapping[str, int]) -> None:
        """Reconnect where needed, send on what came too early, and consume what is wanted."""
        from pamqp.commands import Basic

        self._channel = channel = await self._connection.channel()
        if self._early:
            await self._send_on()
        methods: list[Frame] = []
        for queue, lack in self._missing(wanted).items():
            tag = str(next(self._tags))
            self._consumers[tag] = queue
            self._active[tag] = lack
            methods.append(Basic.Qos(prefetch_count=lack))
            methods.append(Basic.Consume(queue=self._names.queue(queue), consumer_tag=tag))
        if methods:
            async with self._connection.answering():
                await channel.call(*methods)

    async def _send_on(self) -> None:
        """Let messages wait for the rest of their delay: it is longer than the ladder."""
        early, epoch = dict(self._early), self._epoch
        outcomes = await self._broker.dispatch(list(early.values()))
        if epoch == self._epoch:
            sent = [tag for tag, out in zip(early, outcomes, strict=True) if out.status == "done"]
            for tag in early:
                del self._early[tag]
            await self._acknowledge(sent, [tag for tag in early if tag not in sent])

    def _rest_later(self) -> None:
        """See to it that what nobody takes does not wait here while others are idle."""
        if self._idle is None and self._open and any(self._ready.values()):
            loop = asyncio.get_running_loop()
            self._idle = loop.call_later(LINGER, self._rest_unless_busy)

    def _rest_unless_busy(self) -> None:
        self._idle = None
        if any(self._ready.values()) and not self._receiving and self._resting is None:
            self._resting = asyncio.create_task(self._rest())

    async def _rest(self) -> None:
        """Stop consuming and hand what is here on as copies, whose count has not been raised."""
        leaving: list[tuple[Delivery, bytes]] = []
        epoch = self._epoch
        try:
            await self._cancel_consumers()
            if self._receiving:
                return
            epoch = self._epoch
            for ready in self._ready.values():
                leaving.extend(ready)
                ready.clear()
            outcomes = await self._broker.dispatch([_copy_of(*each) for each in leaving])
            if epoch == self._epoch:
                tags: dict[bool, list[int]] = {True: [], False: []}
                for (delivery, _), outcome in zip(leaving, outcomes, strict=True):
                    tags[outcome.status == "done"].append(delivery.fence[1])
                await self._acknowledge(tags[True], tags[False])
        except (Unavailable, ConfigurationError) as error:
            # They are still here, if the connection is: another time.
            log.warning("deliveries that nobody takes could not be handed on: %s", error)
            if epoch == self._epoch:
                for delivery, body in leaving:
                    self._ready[delivery.queue].append((delivery, body))
        finally:
            self._resting = None
            self._rest_later()

    async def _cancel_consumers(self) -> None:
        from pamqp.commands import Basic

        tags = list(self._active)
        self._active.clear()
        if tags and self._channel is not None:
            async with self._connection.answering():
                await self._channel.call(*(Basic.Cancel(consumer_tag=tag) for tag in tags))
        for tag in tags:
            self._consumers.pop(tag, None)

    async def settle(self, settlements: Sequence[Settlement]) -> list[Outcome]:
        mine = [s for s in settlements if self._mine(s.delivery)]
        retries = any(isinstance(settlement, Retry) for settlement in mine)
        if mine and (retries or self._doubtful()):
            await self._probe()
        outcomes = [LOST] * len(settlements)
        done: list[int] = []
        back: list[int] = []
        again: dict[int, Retry] = {}
        taken: set[int] = set()
        for at, settlement in enumerate(settlements):
            fence = settlement.delivery.fence
            if fence in self._settled or (fence[0] == self._epoch and fence[1] in taken):
                outcomes[at] = UNKNOWN
            elif self._mine(settlement.delivery):
                outcomes[at] = UNKNOWN
                taken.add(fence[1])
                if isinstance(settlement, Retry):
                    again[at] = settlement
                else:
                    (done if isinstance(settlement, Ack) else back).append(fence[1])
        await self._acknowledge(done, back)
        if again:
            await self._retry(again, outcomes)
        if taken:
            # Acknowledgements have no reply, but a channel is served in order: with the answer to
            # this the server has seen them, and the death of this process cannot undo them.
            await self._probe()
        if not self._open and not self._held:
            await self.end()
        return outcomes

    async def _retry(self, retries: Mapping[int, Retry], outcomes: list[Outcome]) -> None:
        """Publish the new messages, then acknowledge the old ones."""
        epoch = self._epoch
        tags = {at: retry.delivery.fence[1] for at, retry in retries.items()}
        messages = [retry.message for retry in retries.values()]
        self._settling.update(tags.values())
        try:
            published = await self._broker.publish(messages)
        finally:
            if epoch == self._epoch:
                self._settling.difference_update(tags.values())
        done: list[int] = []
        for at, outcome in zip(retries, published, strict=True):
            if outcome.status == "refused":
                outcomes[at] = outcome
            elif epoch == self._epoch:
                done.append(tags[at])
            else:
                outcomes[at] = TWICE
        await self._acknowledge(done, [])

    async def _acknowledge(self, done: Sequence[int], back: Sequence[int]) -> None:
        """Acknowledge and give back deliveries of this epoch, in one write."""
        channel, epoch = self._channel, self._epoch
        if channel is None or not (done or back):
            return
        methods = list(self._methods(done, back))
        self._settling.update(done, back)
        try:
            async with self._connection.answering():
                await channel.send(*methods)
        except Unavailable:
            # Lost in the middle, the outcome is unknown; otherwise nothing was sent, and the
            # call may be repeated.
            if channel.lost is None:
                raise
        finally:
            if epoch == self._epoch:
                self._settling.difference_update(done, back)
        for tag in (*done, *back):
            self._settled.add((epoch, tag))
            consumer = self._held.pop(tag, "") if epoch == self._epoch else ""
            if consumer in self._active:
                self._active[consumer] += 1

    def _methods(self, done: Iterable[int], back: Iterable[int]) -> Iterator[Frame]:
        """Yield acknowledgements: one for all up to the first delivery that is not finished."""
        from pamqp.commands import Basic

        finished = set(done)
        covered = 0
        for tag in self._held:
            if tag not in finished:
                break
            covered = tag
        if covered:
            yield Basic.Ack(delivery_tag=covered, multiple=True)
        for tag in finished:
            if tag > covered:
                yield Basic.Ack(delivery_tag=tag)
        for tag in back:
            yield Basic.Nack(delivery_tag=tag, requeue=True)

    async def extend(self, deliveries: Sequence[Delivery]) -> list[Delivery | None]:
        if any(self._mine(delivery) for delivery in deliveries):
            await self._probe()
        return [delivery if self._mine(delivery) else None for delivery in deliveries]

    async def close(self) -> None:
        self._open = False
        self._bell.set()
        if self._idle is not None:
            self._idle.cancel()
        pending = {task for task in (self._preparing.pending, self._resting) if task is not None}
        if pending:
            await asyncio.wait(pending)
            for task in pending:
                # A receive that was cancelled will not collect its error any more.
                _ = task.cancelled() or task.exception()
        if not self._lost():
            try:
                await self._cancel_consumers()
                await self._give_back()
            except Unavailable as error:
                self._connection.discard(str(error))
        if not self._held:
            await self.end()

    async def _give_back(self) -> None:
        """Return to the server what `receive` has not returned."""
        unreturned = [d.fence[1] for ready in self._ready.values() for d, _ in ready]
        unreturned += self._early
        for ready in self._ready.values():
            ready.clear()
        self._early.clear()
        await self._acknowledge([], unreturned)

    async def end(self) -> None:
        """Close the connection; what is still held goes back to the server. Idempotent."""
        if not self._lost():
            try:
                # Its answer says that the acknowledgements before it have arrived.
                await self._probe()
            except Unavailable as error:
                self._connection.discard(str(error))
        await self._connection.close()
        self._broker.forget(self)

    async def _set_up(self, channel: Channel, version: tuple[int, ...]) -> None:
        """Begin a new epoch on a new channel, and declare the queues."""
        self._epoch = epoch = next(epochs)
        self._drop(epoch)
        channel.on_delivery = partial(self._arrive, epoch)
        channel.on_lost = partial(self._drop, epoch)
        await declare(channel, namespace_methods(self._names))
        methods = [m for q in self._queues for m in queue_methods(self._names, q, version)]
        await declare(channel, methods, [self._names.queue(queue) for queue in self._queues])

    def _arrive(
        self, epoch: int, consumer: str, tag: int, headers: dict[str, Any], body: bytes
    ) -> None:
        if epoch != self._epoch:
            return
        queue = self._consumers[consumer]
        self._held[tag] = consumer
        if consumer in self._active:
            self._active[consumer] -= 1
        if rest := rest_of(headers):
            self._early[tag] = Parcel(queue, rest, "", body)
        else:
            message = decode_message(body)
            delivery = Delivery(message, queue, (epoch, tag), _count_of(headers))
            self._ready[queue].append((delivery, body))
        self._bell.set()
        if not self._receiving:
            self._rest_later()

    def _drop(self, epoch: int) -> None:
        """Forget what a lost channel held: the server gives it to others."""
        if epoch == self._epoch:
            for forgotten in (self._held, self._early, self._consumers, self._active):
                forgotten.clear()
            self._settling.clear()
            for ready in self._ready.values():
                ready.clear()
            self._bell.set()

    async def _probe(self) -> None:
        """Ask the server for a sign of this channel: what it lost is no longer held after this.

        A server that is silent without having closed it raises `Unavailable` and loses nothing.
        """
        from pamqp.commands import Basic

        channel = self._channel
        if channel is None or channel.lost is not None:
            return
        try:
            async with self._connection.answering():
                # Concerns only consumers that are yet to come, of which there are none.
                await channel.call(Basic.Qos(prefetch_count=1))
        except Unavailable:
            if channel.lost is None:
                raise

    def _doubtful(self) -> bool:
        """Say whether this process was silent for so long that the server may have let go."""
        if self._channel is None:
            return False
        silence = asyncio.get_running_loop().time() - self._channel.heard
        return silence >= self._broker.heartbeat

    def _mine(self, delivery: Delivery) -> bool:
        epoch, tag = delivery.fence
        return epoch == self._epoch and tag in self._held and tag not in self._settling

    def _lost(self) -> bool:
        return self._channel is None or self._channel.lost is not None


def _address(names: Names, parcel: Parcel) -> tuple[Sending, int]:
    """Return how to send a parcel, and the level of the ladder it enters (-1: none)."""
    from qtasks_rabbitmq.channel import Sending

    queue = names.queue(parcel.queue)
    if parcel.delay <= 0:
        counted = {COUNT: str(parcel.count)} if parcel.count else None
        return Sending(parcel.body, queue, "", parcel.message_id, counted), -1
    top, headers = route(parcel.delay)
    return Sending(parcel.body, queue, names.delay, parcel.message_id, headers), top


def _copy_of(delivery: Delivery, body: bytes) -> Parcel:
    """Return a message as it came, for another receiver."""
    name = delivery.message.uuid if isinstance(delivery.message, TaskMessage) else ""
    return Parcel(delivery.queue, 0.0, name, body, (delivery.count or 1) - 1)


def _count_of(headers: Mapping[str, Any]) -> int:
    """Return how often a message was delivered, this time and earlier copies included."""
    returned, copied = headers.get("x-delivery-count", 0), headers.get(COUNT, "")
    count = 1 + returned if isinstance(returned, int) else 1
    return count + int(copied) if isinstance(copied, str) and copied.isdigit() else count


def _chunks(parcels: Sequence[Parcel]) -> Iterator[list[int]]:
    """Split into what is written at once, by number and by size."""
    chunk: list[int] = []
    size = 0
    for at, parcel in enumerate(parcels):
        if chunk and (len(chunk) == MOST_AT_ONCE or size > MOST_BYTES_AT_ONCE):
            yield chunk
            chunk, size = [], 0
        chunk.append(at)
        size += len(parcel.body)
    if chunk:
        yield chunk
