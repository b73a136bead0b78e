"""A subscription that replaces and records deliveries in the transaction that acknowledges them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from qtasks_core import Ack, Delivery, Outcome, Settlement
from qtasks_core.errors import PayloadTooLarge
from qtasks_core.receivers import Recent, SettleCall
from qtasks_core.schemas import LOST
from qtasks_kafka.subscription import KafkaSubscription, Publisher, is_mine, place_of
from qtasks_kafka.transactional_group import Step, TransactionalMembership
from qtasks_kafka.transactions import RecordRefused
from qtasks_kafka.watermark import Partition

if TYPE_CHECKING:
    from qtasks_core.errors import QTasksError
    from qtasks_kafka.writer import Record

UNCLEAR = Outcome("unknown", "the lease was lost while the transaction was being committed")


class Item(NamedTuple):
    """A delivery to settle, and a record to append with it: both or neither."""

    settlement: Settlement
    record: Record | None = None


class Settled(NamedTuple):
    """What became of an item."""

    outcome: Outcome
    appended: bool = False
    """Whether this call has appended the record. An earlier call of the same settlement may have.
    """
    too_large: str = ""
    """Why the topic will never take the record. Then the delivery is not settled."""


class TransactionalPublisher(Publisher, Protocol):
    """The methods of the broker that this subscription uses."""

    async def prepare(self, records: Sequence[Record]) -> None:
        """Make sure that the topics of messages exist."""

    def refusal(self, record: Record) -> QTasksError | None:
        """Return why a record is larger than its topic takes, as far as that is known."""


class TransactionalSubscription(KafkaSubscription):
    """Receives as `KafkaSubscription` does. A replacement is sent with the acknowledgement."""

    _broker: TransactionalPublisher
    _member: TransactionalMembership

    def __init__(
        self,
        broker: TransactionalPublisher,
        member: TransactionalMembership,
        topics: Mapping[str, str],
        left: Callable[[KafkaSubscription], None],
    ) -> None:
        super().__init__(broker, member, topics, left)
        self._unclear = Recent()
        """Settlements whose transaction was cut off, of deliveries that were lost then."""
        self._changing = asyncio.Lock()
        """A record must not be moved while a transaction finishes it."""

    async def settle(self, settlements: Sequence[Settlement]) -> list[Outcome]:
        if all(isinstance(settlement, Ack) for settlement in settlements):
            return await super().settle(settlements)
        return [s.outcome for s in await self.transact([Item(s) for s in settlements])]

    async def transact(self, items: Sequence[Item]) -> list[Settled]:
        """Settle deliveries and append records, all in one transaction.

        If the server refuses a record, each item gets a transaction of its own. Raises
        `Unavailable`: then the transaction may be committed, and a repeat of the call finds out.
        """
        work = _Work(self, items)
        await self._broker.prepare(work.replacements())
        try:
            async with self._changing:
                await self._member.transact(work.plan)
        except RecordRefused as refused:
            if len(items) > 1:
                return [settled for item in items for settled in await self.transact([item])]
            return work.refuse(refused)
        self._member.release_owed()
        if not self._member.in_flight:
            await self._idle()
        return work.results()

    async def _move(self, deliveries: list[Delivery]) -> None:
        async with self._changing:
            await super()._move([delivery for delivery in deliveries if is_mine(delivery)])

    def replacement(self, settlement: Settlement) -> Record | None:
        """Return the record that replaces a delivery."""
        return None if isinstance(settlement, Ack) else self._replacement(settlement)

    def refusal(self, record: Record) -> QTasksError | None:
        """Return why a record is larger than its topic takes, as far as that is known."""
        return self._broker.refusal(record)

    @property
    def obeyed(self) -> Recent:
        """How deliveries were settled."""
        return self._obeyed

    @property
    def unclear(self) -> Recent:
        """Settlements of which it will never be known whether they were committed."""
        return self._unclear


class _Work:
    """The items of one call, and what is left of them at each attempt."""

    def __init__(self, subscription: TransactionalSubscription, items: Sequence[Item]) -> None:
        self._subscription = subscription
        self._items = items
        self._call = SettleCall([item.settlement for item in items])
        self._replacements = {
            place: record
            for place, settlement in self._call.first.items()
            if (record := subscription.replacement(settlement)) is not None
        }
        self._too_large: dict[int, str] = {}
        """Why the records of some items cannot be appended."""
        self._appended: set[int] = set()

    def replacements(self) -> list[Record]:
        """Return the messages that may be sent."""
        return list(self._replacements.values())

    def plan(self) -> Step | None:
        """Return the transaction of what is left to do."""
        records: list[Record] = []
        finished: dict[Partition, set[int]] = {}
        places: list[int] = []
        for place, settlement in self._call.first.items():
            partition, offset = place_of(settlement.delivery)
            if not partition.holds(offset):
                if offset in partition.unconfirmed and not partition.lost:
                    finished.setdefault(partition, set())  # an earlier call did not get so far
            elif self._fits(place):
                finished.setdefault(partition, set()).add(offset)
                places.append(place)
                both = self._replacements.get(place), self._items[place].record
                records += [record for record in both if record is not None]
        if not finished:
            return None

        def done() -> None:
            for place in places:
                partition, offset = place_of(self._call.first[place].delivery)
                partition.finish(offset)
                partition.unconfirmed.discard(offset)
                self._subscription.obeyed.add(self._call.keys[place])
            self._appended.update(places)

        def unclear() -> None:
            for place in places:
                self._subscription.unclear.add(self._call.keys[place])

        return Step(records, finished, done, unclear)

    def _fits(self, place: int) -> bool:
        """Return whether both records of an item can be sent, as far as that is known."""
        own, replacement = self._items[place].record, self._replacements.get(place)
        if own is not None and (refusal := self._subscription.refusal(own)) is not None:
            self._too_large[place] = str(refusal)
        elif replacement is not None and (refusal := self._subscription.refusal(replacement)):
            self._call.answer(place, Outcome("refused", str(refusal)))
        else:
            return True
        return False

    def refuse(self, refused: RecordRefused) -> list[Settled]:
        """Return what becomes of the only item if the server refuses one of its records."""
        record = self._items[0].record
        if record is not None and record.topic == refused.topic:
            if not isinstance(refused.reason, PayloadTooLarge):
                raise refused.reason
            return [Settled(LOST, too_large=str(refused.reason))]
        return [Settled(Outcome("refused", str(refused.reason)))]

    def results(self) -> list[Settled]:
        """Return what became of the items."""
        for place, settlement in self._call.first.items():
            key = self._call.keys[place]
            partition, offset = place_of(settlement.delivery)
            if key in self._subscription.obeyed and partition.settled(offset):
                self._call.done(place)
            elif key in self._subscription.unclear:
                self._call.answer(place, UNCLEAR)
        return [
            Settled(outcome, place in self._appended, self._too_large.get(place, ""))
            for place, outcome in enumerate(self._call.outcomes())
        ]
