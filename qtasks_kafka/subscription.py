"""A subscription on Kafka: receives from the partitions that the group assigns to this member."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from qtasks_core import (
    Ack,
    Delivery,
    Outcome,
    Retry,
    Settlement,
    Subscription,
    TaskMessage,
)
from qtasks_core.errors import Closed, Unavailable
from qtasks_core.receivers import Recent, SettleCall
from qtasks_core.wire import decode_message
from qtasks_kafka.watermark import Partition

if TYPE_CHECKING:
    from aiokafka.structs import ConsumerRecord

    from qtasks_kafka.group import Membership
    from qtasks_kafka.writer import Record, Written

logger = logging.getLogger("qtasks.kafka")

_DELIVERED = "delivered"
"""Header of a copy: how often its original was delivered."""


class Publisher(Protocol):
    """The methods of the broker that a subscription uses."""

    def topic(self, queue: str) -> str:
        """Return the topic of a queue."""

    def record(self, message: TaskMessage) -> Record:
        """Return the record that carries a message to its queue, now or after its delay."""

    async def append(self, records: Sequence[Record]) -> list[Outcome]:
        """Append records. They are durable when the call returns."""

    async def copy(self, records: Sequence[Record]) -> list[Written]:
        """Append copies of records to the topics that they are in."""


class Fence(NamedTuple):
    """A record of a partition, held since one takeover of the partition."""

    partition: Partition
    offset: int
    topic: str
    number: int
    value: bytes


class KafkaSubscription(Subscription):
    """Receives from the partitions that the group assigns to this member."""

    def __init__(
        self,
        broker: Publisher,
        member: Membership,
        topics: Mapping[str, str],
        left: Callable[[KafkaSubscription], None],
    ) -> None:
        self._broker = broker
        self._member = member
        self._left = left
        """Called once the subscription holds nothing any more, and cannot get anything."""
        self._queues = dict(topics)
        self._fetched: dict[str, deque[tuple[Partition, Any]]] = {
            queue: deque() for queue in topics.values()
        }
        self._epoch = member.epoch
        self._obeyed = Recent()
        """How deliveries were settled, even if the group does not know it yet."""
        self._receiving = False
        self._moving: asyncio.Future[None] | None = None
        """Done once no copy can come that is not noted yet. Until then, nothing is delivered."""
        # Messages must not wait in the partitions of a receiver that never receives.
        loop = asyncio.get_running_loop()
        self._resting: asyncio.TimerHandle | None = loop.call_later(member.rest, member.want, False)
        self._passing: asyncio.Task[None] | None = None
        self._leaving: asyncio.Task[None] | None = None
        self._closed: asyncio.Future[None] = loop.create_future()

    async def receive(self, wanted: Mapping[str, int], limit: int) -> list[Delivery]:
        queues = [queue for queue, most in wanted.items() if most > 0]
        self._stay_awake()
        self._receiving = True
        try:
            while not self._closed.done():
                if any(self._fetched.values()):
                    await self._member.recheck()
                if self._moving is not None:
                    await asyncio.wait({self._moving})
                deliveries = self._take(wanted, limit)
                if deliveries:
                    await self._announce(deliveries)
                    return deliveries
                await self._fetch(queues, limit)
        finally:
            self._receiving = False
            if not self._member.in_flight:
                await self._idle()
        raise Closed("the subscription is closed")

    def _stay_awake(self) -> None:
        """Ask for partitions (again)."""
        if self._resting is not None:
            self._resting.cancel()
            self._resting = None
        if not self._closed.done():
            self._member.want(True)

    async def _idle(self) -> None:
        """Release unneeded partitions, because no record is in flight.

        Messages must not wait in the partitions of a receiver that does not receive.
        """
        if self._closed.done():
            await self.leave()
        elif not self._receiving and self._resting is None:
            loop = asyncio.get_running_loop()
            self._resting = loop.call_later(self._member.rest, self._member.want, False)

    def _take(self, wanted: Mapping[str, int], limit: int) -> list[Delivery]:
        """Deliver fetched records, unless a rebalance has come in between."""
        deliveries: list[Delivery] = []
        if self._epoch != self._member.epoch:
            return deliveries
        for queue, most in wanted.items():
            quota = min(most, limit - len(deliveries))
            while (fetched := self._fetched[queue]) and quota > 0:
                partition, record = fetched[0]
                if partition.skips(record.offset):
                    self._look_again(queue)
                    continue
                fetched.popleft()
                before = _delivered_before(record) if record.headers else 0
                count = partition.deliver(record.offset, before)
                if count is not None:
                    value = record.value or b""
                    fence = Fence(partition, record.offset, record.topic, record.partition, value)
                    known = count if count > 1 else None
                    deliveries.append(Delivery(decode_message(value), queue, fence, known))
                    quota -= 1
        return deliveries

    def _look_again(self, queue: str) -> None:
        """Drop the fetched records of the first partition, and fetch again from a gap on."""
        fetched = self._fetched[queue]
        partition, record = fetched[0]
        self._fetched[queue] = deque(item for item in fetched if item[0] is not partition)
        self._member.look_again(partition, record.offset)

    async def _announce(self, deliveries: list[Delivery]) -> None:
        """After a takeover, let the group count the first deliveries before they run.

        Records that were in flight when the previous owner died are delivered again.
        """
        new = {d.fence.partition for d in deliveries if not d.fence.partition.announced}
        if not new:
            return
        try:
            await self._member.confirm(new)
        except BaseException:
            for delivery in reversed(deliveries):
                delivery.fence.partition.take_back(delivery.fence.offset)
            self._member.void()
            raise
        for partition in new:
            partition.announced = True

    async def _fetch(self, queues: list[str], limit: int) -> None:
        """Wait for records, a change of partitions or the close. All fetched records are kept."""
        filling = asyncio.create_task(self._fill(queues, limit))
        try:
            await asyncio.wait(
                {filling, self._closed, self._member.changed},
                return_when=asyncio.FIRST_COMPLETED,
            )
        finally:
            if not filling.done():
                filling.cancel()
                await asyncio.wait({filling})
        if not filling.cancelled():
            filling.result()

    async def _fill(self, queues: list[str], limit: int) -> None:
        topics = [self._broker.topic(queue) for queue in queues]
        records = await self._member.poll(topics, limit)
        if self._epoch != self._member.epoch:
            for fetched in self._fetched.values():
                fetched.clear()
            self._epoch = self._member.epoch
        for partition, record in records:
            self._fetched[self._queues[record.topic]].append((partition, record))

    async def settle(self, settlements: Sequence[Settlement]) -> list[Outcome]:
        call = SettleCall(settlements)
        replaced = {
            place: settlement
            for place, settlement in call.first.items()
            if not isinstance(settlement, Ack) and is_mine(settlement.delivery)
        }
        refused = await self._replace(replaced) if replaced else {}
        finished: set[int] = set()
        touched: set[Partition] = set()
        for place, settlement in call.first.items():
            partition, offset = place_of(settlement.delivery)
            if place in refused:
                call.answer(place, refused[place])
            elif not partition.lost:
                if partition.finish(offset):
                    finished.add(place)
                    self._obeyed.add(call.keys[place])
                if partition.unconfirmed:
                    touched.add(partition)
        if touched:
            await self._member.confirm(touched)
        self._member.release_owed()
        if not self._member.in_flight:
            await self._idle()
        for place, settlement in call.first.items():
            partition, offset = place_of(settlement.delivery)
            obeyed = place in finished or call.keys[place] in self._obeyed
            if obeyed and partition.settled(offset):
                call.done(place)
        return call.outcomes()

    async def _replace(self, settlements: Mapping[int, Settlement]) -> dict[int, Outcome]:
        """Append the replacements of retried or released records. Return the refused ones.

        The group is asked first, because a receiver without the lease must not append anything.
        """
        await self._member.confirm({place_of(s.delivery)[0] for s in settlements.values()})
        mine = {place: s for place, s in settlements.items() if is_mine(s.delivery)}
        sent = await self._broker.append([self._replacement(s) for s in mine.values()])
        answers = zip(mine, sent, strict=True)
        return {place: outcome for place, outcome in answers if outcome.status != "done"}

    def _replacement(self, settlement: Settlement) -> Record:
        """Return the record that a retry or a release appends. A release stays in its partition."""
        from qtasks_kafka.writer import Record

        if isinstance(settlement, Retry):
            return self._broker.record(settlement.message)
        fence: Fence = settlement.delivery.fence
        return Record(fence.topic, fence.value, partition=fence.number)

    async def extend(self, deliveries: Sequence[Delivery]) -> list[Delivery | None]:
        """Ask the group with a commit: heartbeats run by themselves, but they tell us nothing.

        Deliveries from a partition that another member should have are moved to one that we keep.
        """
        if held := {place_of(d)[0] for d in deliveries if is_mine(d)}:
            await self._member.confirm(held)
            if self._moving is None and any(map(self._member.owes, held)):
                self._moving = asyncio.get_running_loop().create_future()
                try:
                    await self._move([d for d in deliveries if is_mine(d)])
                finally:
                    self._moving.set_result(None)
                    self._moving = None
        return [delivery if is_mine(delivery) else None for delivery in deliveries]

    async def _move(self, deliveries: list[Delivery]) -> None:
        """Copy records in flight out of the owed partitions, and finish the originals there."""
        from qtasks_kafka.writer import Record

        moving: list[tuple[Partition, int, Partition, Record]] = []
        for delivery in deliveries:
            fence: Fence = delivery.fence
            partition, offset = place_of(delivery)
            kept = self._member.kept(fence.topic)
            if kept is not None and self._member.owes(partition):
                number, target = kept
                count = str(partition.count_of(offset)).encode()
                headers = ((_DELIVERED, count),)
                copy = Record(fence.topic, fence.value, headers=headers, partition=number)
                moving.append((partition, offset, target, copy))
        written = await self._broker.copy([copy for *_, copy in moving])
        touched: set[Partition] = set()
        for (partition, offset, target, _), copied in zip(moving, written, strict=True):
            if copied.offset < target.position or target.lost:
                continue  # a rebalance has come in between: both records stay
            if partition.holds(offset):
                partition.move(offset, target, copied.offset)
                touched.add(partition)
            else:
                # The original was settled in between, or another member has it now.
                target.discard(copied.offset)
                touched.add(target)
        if touched:
            await self._member.confirm(touched)
        self._member.release_owed()

    async def drop(self, topic: str, ends: Mapping[int, int]) -> dict[int, int]:
        """Drop undelivered records before these offsets of a topic. See `Membership.drop`."""
        return await self._member.drop(topic, ends)

    async def close(self) -> None:
        if self._closed.done():
            return
        self._end()
        if self._member.in_flight:
            self._member.want(False)
            self._passing = asyncio.create_task(self._pass_on())
        else:
            await self.leave()

    def _end(self) -> None:
        if self._resting is not None:
            self._resting.cancel()
        if not self._closed.done():
            self._closed.set_result(None)

    async def _pass_on(self) -> None:
        """Copy new messages to other partitions: ours are only kept for records in flight."""
        await asyncio.wait({self._member.changed})
        passing: list[tuple[Partition, Any]] = []
        while self._member.in_flight:
            try:
                if not passing:
                    records = await self._member.poll(list(self._queues), 256)
                    passing = self._to_pass_on(records)
                await self._copy(passing)
                passing = []
            except Unavailable as error:
                logger.warning("messages wait for tasks that a closed subscription runs: %s", error)
                await asyncio.sleep(1.0)
        await self.leave()

    def _to_pass_on(self, records: list[tuple[Partition, Any]]) -> list[tuple[Partition, Any]]:
        passing = []
        looking: set[Partition] = set()
        for partition, record in records:
            if partition in looking:
                continue
            if partition.skips(record.offset):
                looking.add(partition)
                self._member.look_again(partition, record.offset)
            elif partition.deliver(record.offset):
                passing.append((partition, record))
        return passing

    async def _copy(self, records: list[tuple[Partition, Any]]) -> None:
        from qtasks_kafka.writer import Record

        copies = []
        for at, (_, record) in enumerate(records):
            others = self._member.others(record.topic) or [record.partition]
            number = others[at % len(others)]
            copies.append(Record(record.topic, record.value, partition=number))
        if copies:
            await self._broker.append(copies)
        for partition, record in records:
            partition.finish(record.offset)
        await self._member.confirm({partition for partition, _ in records})

    async def leave(self) -> None:
        """Leave the group. Records in flight are lost. Idempotent."""
        self._end()
        if self._leaving is None:
            self._leaving = asyncio.create_task(self._leave())
        await asyncio.shield(self._leaving)

    async def _leave(self) -> None:
        if self._passing is not None:
            self._passing.cancel()
            await asyncio.wait({self._passing})
        await self._member.close()
        self._left(self)


def place_of(delivery: Delivery) -> tuple[Partition, int]:
    """Return the partition and the offset of a delivered record, or of the copy of it."""
    partition, offset, *_ = delivery.fence
    while offset in partition.moved:
        partition, offset = partition.moved[offset]
    return partition, offset


def is_mine(delivery: Delivery) -> bool:
    """Return whether a delivery is still to be settled here."""
    partition, offset = place_of(delivery)
    return partition.holds(offset)


def _delivered_before(record: ConsumerRecord) -> int:
    """Return how often the original of a copied record was delivered; 0 without an original."""
    for name, value in record.headers:
        if name == _DELIVERED and value is not None and value.isdigit() and len(value) < 10:
            return int(value)
    return 0
