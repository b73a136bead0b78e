"""One lane of a subscription, on its own channel: its errors do not affect other lanes."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any

from qtasks_core import Ack, Delivery, Outcome, Raw, Release, Retry, Settlement
from qtasks_core.errors import Unavailable
from qtasks_core.receivers import Recent, SettleCall
from qtasks_core.wire import decode_message
from qtasks_rabbitmq.connection import Connection
from qtasks_rabbitmq.delays import rest_of
from qtasks_rabbitmq.parcel import Dispatcher, Parcel, copy_of, count_of, lane_of
from qtasks_rabbitmq.topology import OWN_TIMEOUTS, USUAL, Names, queue_methods

if TYPE_CHECKING:
    from pamqp.base import Frame

    from qtasks_rabbitmq.channel import Arrival, Channel

UNKNOWN = Outcome("unknown", "RabbitMQ does not answer an acknowledgement")
TWICE = Outcome("unknown", "the retry is published, but the lease of the old delivery was lost")

logger = logging.getLogger("qtasks.rabbitmq")
LONG_TIMEOUT = 30 * 86_400.0
"""Seconds. It has room in the 32 bits of milliseconds that an Erlang timer has."""
HELD_AT_MOST = 2 / 3
"""The share of the consumer timeout for which a delivery is held before it is handed over."""
NOBODY = ("", 0.0)

epochs = count(1)
"""Numbers the channels of all lanes. A fence is (epoch, delivery tag, source)."""


class Lane:
    """Consumers of one lane. Their channel is the lease of all deliveries that it holds."""

    def __init__(
        self,
        queue: str,
        names: Names,
        source: str,
        capacity: int,
        connection: Connection,
        broker: Dispatcher,
        arrived: Callable[[], None],
        priority: int = USUAL,
    ) -> None:
        self.queue = queue
        """The task queue."""
        self.source = source
        """The server's name of the lane."""
        self._names = names
        self._priority = priority
        self._capacity = capacity
        self._connection = connection
        self._broker = broker
        self._arrived = arrived
        """Called when the lane has work to do or deliveries to take."""
        self._channel: Channel | None = None
        self._epoch = 0
        self.held: dict[int, tuple[str, float]] = {}
        """Delivery tags of this epoch, in order, with consumer and time (the loop's) of each."""
        self._settling: set[int] = set()
        """Delivery tags that a call is settling now."""
        self.ready: deque[tuple[Delivery, bytes]] = deque()
        """Deliveries that `receive` has not returned yet, with their bodies."""
        self._early: dict[int, Parcel] = {}
        """Messages to send on: they left the ladder at the wrong place or too early."""
        self._settled = Recent()
        self._tags = count(1)
        self._active: dict[str, int] = {}
        """Consumer tag -> how many more deliveries the server may push to this consumer."""

    def methods(self, version: tuple[int, ...]) -> list[Frame]:
        """Return the methods that declare the lane."""
        return queue_methods(self._names, self.queue, version, self._priority)

    async def open(self) -> None:
        """Open the channel. Raises `Unavailable`, `ConfigurationError`.

        Others may publish as soon as the queue is there, so a new one first has to be remembered.
        """
        self._channel = await self._connection.channel(self.source)
        await self._connection.registered()

    @property
    def consumes(self) -> bool:
        """Whether it has consumers."""
        return bool(self._active)

    def begin(self, channel: Channel) -> None:
        """Start a new epoch on a new channel."""
        self._epoch = epoch = next(epochs)
        self._drop(epoch)
        self._channel = channel
        channel.on_delivery = partial(self._arrive, epoch)
        channel.on_lost = partial(self._drop, epoch)

    def needs(self, wanted: int) -> bool:
        """Return whether `prepare` has something to do."""
        return self.lost or bool(self._early) or self._lack(wanted) > 0

    async def prepare(self, wanted: int) -> None:
        """Reconnect if needed, send on messages that came too early, and start consumers."""
        from pamqp.commands import Basic

        await self.open()
        if self._early:
            await self._send_on()
        channel, lack = self._channel, self._lack(wanted)
        if lack > 0 and channel is not None:
            tag = str(next(self._tags))
            self._active[tag] = lack
            try:
                async with self._connection.answering():
                    await channel.call(
                        Basic.Qos(prefetch_count=lack),
                        self._consume_method(tag),
                    )
            except BaseException:
                # The consumer may not exist, so expect no deliveries from it.
                self._active.pop(tag, None)
                raise

    def _consume_method(self, tag: str) -> Frame:
        """Return the method that starts a consumer, with a long timeout if it can have its own."""
        from pamqp.commands import Basic

        arguments: dict[str, Any] = {}
        if self._connection.version >= OWN_TIMEOUTS:
            arguments["x-consumer-timeout"] = round(LONG_TIMEOUT * 1000)
        return Basic.Consume(queue=self.source, consumer_tag=tag, arguments=arguments)

    def _lack(self, wanted: int) -> int:
        """Return how many deliveries are wanted beyond those that are here or may be pushed."""
        coming = sum(self._active.values()) + len(self.ready)
        return min(wanted, self._capacity) - coming

    async def _send_on(self) -> None:
        """Publish the messages to send on, then acknowledge them. Failed ones stay held."""
        early, epoch = dict(self._early), self._epoch
        outcomes = await self._broker.dispatch(list(early.values()))
        if epoch != self._epoch:
            return
        sent: list[int] = []
        for (tag, parcel), outcome in zip(early.items(), outcomes, strict=True):
            if outcome.status == "done":
                sent.append(tag)
            else:
                # Keep it until this channel closes: if released, it would come back at once.
                logger.error("a task for %s cannot be sent on: %s", parcel.queue, outcome.reason)
                del self._early[tag]
        await self._acknowledge(sent, [])
        if epoch == self._epoch:
            for tag in sent:
                self._early.pop(tag, None)

    async def rest(self, busy: Callable[[], bool]) -> None:
        """Stop consuming, and pass on the ready deliveries as copies. Their count is not raised.

        It stops if `busy` reports that somebody receives again.
        """
        handed = False
        await self.cancel_consumers()
        if busy():
            return
        epoch = self._epoch
        leaving = list(self.ready)
        self.ready.clear()
        try:
            outcomes = await self._broker.dispatch([copy_of(*each) for each in leaving])
            handed = True
        finally:
            if not handed and epoch == self._epoch:
                # They are still held if the channel still lives. Try again later.
                self.ready.extendleft(reversed(leaving))
        if epoch == self._epoch:
            tags: dict[bool, list[int]] = {True: [], False: []}
            for (delivery, _), outcome in zip(leaving, outcomes, strict=True):
                tags[outcome.status == "done"].append(delivery.fence[1])
            await self._acknowledge(tags[True], tags[False])

    async def let_go(self) -> None:
        """Give up the channel: the queue was deleted, together with all held messages."""
        from pamqp.commands import Channel as Methods

        channel = self._channel
        if channel is not None and channel.lost is None:
            try:
                async with self._connection.answering():
                    await channel.send(Methods.Close(200, "its queue was deleted", 0, 0))
            except Unavailable as error:
                logger.debug("%s: %s", self.source, error)  # the channel is lost anyway
            channel.fail(f"the queue {self.source} was deleted")

    async def cancel_consumers(self) -> None:
        """Make the server stop pushing deliveries."""
        from pamqp.commands import Basic

        tags = list(self._active)
        self._active.clear()
        if tags and self._channel is not None:
            async with self._connection.answering():
                await self._channel.call(*(Basic.Cancel(consumer_tag=tag) for tag in tags))

    async def settle(self, settlements: Sequence[Settlement]) -> list[Outcome]:
        """Settle deliveries of this queue."""
        mine = [s for s in settlements if self.mine(s.delivery)]
        retries = any(isinstance(settlement, Retry) for settlement in mine)
        if mine and (retries or self._doubtful()):
            await self.probe()
        call = SettleCall(settlements, self._settled, obeyed=UNKNOWN)
        taken = {place: s for place, s in call.first.items() if self.mine(s.delivery)}
        tags = {place: settlement.delivery.fence[1] for place, settlement in taken.items()}
        again = {place: s for place, s in taken.items() if isinstance(s, Retry)}
        done = [place for place, s in taken.items() if isinstance(s, Ack)]
        back = [place for place, s in taken.items() if isinstance(s, Release)]
        await self._acknowledge([tags[place] for place in done], [tags[place] for place in back])
        for place in (*done, *back):
            self._settled.add(call.done(place))
        if again:
            await self._retry(again, call)
        if taken:
            # Acknowledgements have no reply, but the server handles a channel's methods in order.
            # Once it has answered this probe, it has seen the acknowledgements. From then on, a
            # crash of this process cannot undo them.
            await self.probe()
        return call.outcomes()

    async def _retry(self, retries: Mapping[int, Retry], call: SettleCall) -> None:
        """Publish the new messages, then acknowledge the old ones."""
        epoch = self._epoch
        tags = {place: retry.delivery.fence[1] for place, retry in retries.items()}
        messages = [retry.message for retry in retries.values()]
        self._settling.update(tags.values())
        try:
            published = await self._broker.publish(messages)
        finally:
            if epoch == self._epoch:
                self._settling.difference_update(tags.values())
        done: list[int] = []
        for place, outcome in zip(retries, published, strict=True):
            if outcome.status == "refused":
                call.answer(place, outcome)
            elif epoch == self._epoch:
                done.append(place)
            else:
                call.answer(place, TWICE)
        await self._acknowledge([tags[place] for place in done], [])
        for place in done:
            self._settled.add(call.done(place))

    async def _acknowledge(self, done: Sequence[int], back: Sequence[int]) -> None:
        """Acknowledge and release deliveries of this epoch, in one write."""
        channel, epoch = self._channel, self._epoch
        if channel is None or not (done or back):
            return
        methods = list(self._methods(done, back))
        self._settling.update(done, back)
        try:
            async with self._connection.answering():
                await channel.send(*methods)
        except Unavailable:
            # If the channel was lost meanwhile, the outcome is unknown. Otherwise nothing was sent,
            # and the call may be retried.
            if channel.lost is None:
                raise
        finally:
            if epoch == self._epoch:
                self._settling.difference_update(done, back)
        for tag in (*done, *back):
            consumer, _ = self.held.pop(tag, NOBODY) if epoch == self._epoch else NOBODY
            if consumer in self._active:
                self._active[consumer] += 1

    def _methods(self, done: Iterable[int], back: Iterable[int]) -> Iterator[Frame]:
        """Yield the acknowledgements. One covers all deliveries before the first unfinished one."""
        from pamqp.commands import Basic

        finished = set(done)
        covered = 0
        for tag in self.held:
            if tag not in finished:
                break
            covered = tag
        if covered:
            yield Basic.Ack(delivery_tag=covered, multiple=True)
        for tag in finished:
            if tag > covered:
                yield Basic.Ack(delivery_tag=tag)
        yield from self._back(back)

    def _back(self, tags: Iterable[int]) -> Iterator[Frame]:
        """Yield the methods that release deliveries."""
        from pamqp.commands import Basic

        for tag in tags:
            yield Basic.Nack(delivery_tag=tag, requeue=True)

    async def give_back(self) -> None:
        """Stop consuming, and release the fetched deliveries that no call has returned."""
        await self.cancel_consumers()
        unreturned = [delivery.fence[1] for delivery, _ in self.ready]
        unreturned += self._early
        self.ready.clear()
        self._early.clear()
        await self._acknowledge([], unreturned)

    def _arrive(self, epoch: int, arrival: Arrival) -> None:
        if epoch != self._epoch:
            return
        self.held[arrival.tag] = (arrival.consumer, self._heard)
        if arrival.consumer in self._active:
            self._active[arrival.consumer] -= 1
        self.sort(epoch, arrival)
        self._arrived()

    def sort(self, epoch: int, arrival: Arrival) -> None:
        """Sort an arrival: it is to be received, or to be sent on."""
        message = None
        times = None
        try:
            if arrival.error:
                raise ValueError(arrival.error)
            times = count_of(arrival.headers)
            if rest := rest_of(arrival.headers):
                self.send_on_later(arrival, self.queue, rest)
                return
        except ValueError as error:
            # Another program wrote it: no release of QTasks writes such properties.
            message = Raw(arrival.body, str(error))
        fence = (epoch, arrival.tag, self.source)
        delivery = Delivery(message or decode_message(arrival.body), self.queue, fence, times)
        self.ready.append((delivery, arrival.body))

    def send_on_later(self, arrival: Arrival, queue: str, delay: float) -> None:
        """Note that a delivery of this epoch must be published again."""
        body = arrival.body
        priority = lane_of(decode_message(body))
        self._early[arrival.tag] = Parcel(queue, delay, "", body, priority=priority)

    def _drop(self, epoch: int) -> None:
        """Forget the deliveries of a lost channel: the server gives them to other receivers."""
        if epoch == self._epoch:
            if self._channel is not None and self._channel.consumer_timeout is not None:
                self._connection.consumer_timeout = self._channel.consumer_timeout
            self.held.clear()
            self._early.clear()
            self._active.clear()
            self._settling.clear()
            self.ready.clear()
            self._arrived()

    async def probe(self) -> None:
        """Ask the server whether this channel is alive. After that, no lost delivery is held.

        If the server is silent but has not closed the channel, it raises `Unavailable` and loses
        nothing.
        """
        from pamqp.commands import Basic

        channel = self._channel
        if channel is None or channel.lost is not None:
            return
        try:
            async with self._connection.answering():
                # This affects only later consumers, and none follow.
                await channel.call(Basic.Qos(prefetch_count=1))
        except Unavailable:
            if channel.lost is None:
                raise

    def _doubtful(self) -> bool:
        """Return whether this process was silent so long that the server may have dropped it."""
        if self._channel is None:
            return False
        silence = asyncio.get_running_loop().time() - self._heard
        return silence >= self._broker.heartbeat

    def is_long(self, delivery: Delivery) -> bool:
        """Return whether the server would soon take back a delivery that is held now."""
        _, since = self.held[delivery.fence[1]]
        own = self._connection.version >= OWN_TIMEOUTS
        timeout = LONG_TIMEOUT if own else self._connection.consumer_timeout
        # The next call comes after a third of the lease, which is a heartbeat.
        most = min(timeout * HELD_AT_MOST, timeout - 2 * self._broker.heartbeat)
        return asyncio.get_running_loop().time() - since > most

    async def hand_over(self, deliveries: Sequence[Delivery]) -> None:
        """Acknowledge deliveries of which somebody holds a copy."""
        await self._acknowledge([delivery.fence[1] for delivery in deliveries], [])

    def mine(self, delivery: Delivery) -> bool:
        """Return whether a delivery is held now and no call is settling it."""
        epoch, tag, _ = delivery.fence
        return epoch == self._epoch and tag in self.held and tag not in self._settling

    @property
    def _heard(self) -> float:
        """The loop's time of the last frame from the server."""
        return self._channel.heard if self._channel is not None else 0.0

    @property
    def lost(self) -> bool:
        """Whether the channel is missing or lost."""
        return self._channel is None or self._channel.lost is not None
