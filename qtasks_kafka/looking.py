"""Reads the state of a queue from outside: its partitions, their owners, and delayed messages."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, NamedTuple

from qtasks_kafka.connection import Connection, close_consumer
from qtasks_kafka.settings import REQUEST
from qtasks_kafka.watermark import Partition, restored

if TYPE_CHECKING:
    from aiokafka import AIOKafkaConsumer
    from aiokafka.structs import OffsetAndMetadata, TopicPartition

POLL_MS = 200
COUNTED = 2000
"""Offsets of a queue that are read to count its messages."""
_UNUSED = ("Empty", "Dead")
_STABLE = "Stable"


class Seen(NamedTuple):
    """One partition of a queue as the group's last commit shows it."""

    partition: Partition
    end: int

    @property
    def undelivered(self) -> int:
        """The number of records that were not delivered yet."""
        return self.end - self.partition.position


class Owners(NamedTuple):
    """Who has the partitions of a group."""

    unused: bool
    """Whether the group has no member."""
    settled: bool
    """Whether no rebalance is under way, so that `owned` is complete."""
    owned: frozenset[TopicPartition]


class Looker:
    """A client that reads the commits of a group, and is no member of it."""

    def __init__(self, connection: Connection, consumer: AIOKafkaConsumer, group: str) -> None:
        self._connection = connection
        self._consumer = consumer
        self._group = group

    async def commits(
        self, places: Iterable[TopicPartition]
    ) -> dict[TopicPartition, OffsetAndMetadata]:
        """Return the group's commits, with their metadata, which the driver's method drops."""
        coordinator = self._consumer._coordinator
        found: dict[TopicPartition, OffsetAndMetadata]
        found = await coordinator.fetch_committed_offsets(list(places))
        return found

    async def look(self, places: list[TopicPartition]) -> dict[TopicPartition, Seen]:
        """Return what the group's last commits and the log show of these partitions."""
        commits = await self.commits(places)
        first = await self._consumer.beginning_offsets(places)
        end = await self._consumer.end_offsets(places)
        seen: dict[TopicPartition, Seen] = {}
        for place in places:
            known = commits.get(place)
            partition = restored(known.offset, known.metadata) if known else Partition(0)
            if partition.position > end[place]:
                partition = Partition(0)  # the topic was created again
            partition.begin(first[place])
            seen[place] = Seen(partition, end[place])
        return seen

    async def undelivered(
        self, seen: Mapping[TopicPartition, Seen], deadline: asyncio.Timeout
    ) -> int:
        """Return how many records were not delivered yet.

        Up to `COUNTED` offsets, it reads them: some have only the mark of a transaction. Each
        answer of the server moves the deadline.
        """
        total = sum(each.undelivered for each in seen.values())
        if not 0 < total <= COUNTED:
            return total
        consumer, clock = self._consumer, asyncio.get_running_loop().time
        consumer.assign(list(seen))
        for place, each in seen.items():
            consumer.seek(place, each.partition.position)
        count, behind = 0, set(seen)
        while behind := {tp for tp in behind if await consumer.position(tp) < seen[tp].end}:
            for place, records in (await consumer.getmany(*behind, timeout_ms=POLL_MS)).items():
                deadline.reschedule(clock() + REQUEST)
                count += sum(record.offset < seen[place].end for record in records)
        return count

    async def kept(self, places: list[TopicPartition]) -> int:
        """Return how many records these partitions have."""
        first = await self._consumer.beginning_offsets(places)
        end = await self._consumer.end_offsets(places)
        return sum(end[place] - first[place] for place in places)

    async def owners(self) -> Owners:
        """Ask the group's coordinator which partitions have an owner."""
        from aiokafka.coordinator.protocol import ConsumerProtocolMemberAssignment

        (answer,) = await self._connection.started().describe_consumer_groups([self._group])
        ((code, _, state, _, _, members, *_),) = answer.groups
        self._connection.check(code, self._group)
        owned: set[TopicPartition] = set()
        for member in members:
            if assignment := member[4]:
                owned.update(ConsumerProtocolMemberAssignment.decode(assignment).partitions())
        unused = state in _UNUSED
        return Owners(unused, unused or state == _STABLE, frozenset(owned))

    async def waiting(
        self, places: list[TopicPartition], target: str, deadline: asyncio.Timeout
    ) -> dict[TopicPartition, list[bytes]]:
        """Return the keys of the delayed messages to the topic `target`.

        It reads the topic of delays from where its group stands. Each answer of the server moves
        the deadline.
        """
        from qtasks_kafka.delays import target_of

        consumer, clock = self._consumer, asyncio.get_running_loop().time
        commits = await self.commits(places)
        first = await consumer.beginning_offsets(places)
        end = await consumer.end_offsets(places)
        consumer.assign(places)
        for place in places:
            known = commits.get(place)
            consumer.seek(place, max(first[place], min(known.offset if known else 0, end[place])))
        keys: dict[TopicPartition, set[bytes]] = {place: set() for place in places}
        behind = set(places)
        while behind := {tp for tp in behind if await consumer.position(tp) < end[tp]}:
            for place, records in (await consumer.getmany(*behind, timeout_ms=POLL_MS)).items():
                deadline.reschedule(clock() + REQUEST)
                for record in records:
                    if record.key is None:
                        continue  # another program's record: it cannot be deleted by its key
                    keys[place].discard(record.key)
                    if record.value is not None and target_of(record) == target:
                        keys[place].add(record.key)
        return {place: sorted(some) for place, some in keys.items() if some}


@asynccontextmanager
async def looking(
    connection: Connection, group: str
) -> AsyncIterator[tuple[Looker, asyncio.Timeout]]:
    """Give a client for a few questions, and their deadline. Raises `Unavailable` after it."""
    consumer = connection.consumer(group_id=group, auto_offset_reset="none")
    try:
        with connection.reaching():
            async with asyncio.timeout(REQUEST) as deadline:
                await consumer.start()
                yield Looker(connection, consumer, group), deadline
    finally:
        await close_consumer(consumer)


def places_of(topic: str, numbers: Iterable[int]) -> list[TopicPartition]:
    """Return the partitions of a topic as the driver names them."""
    from aiokafka.structs import TopicPartition

    return [TopicPartition(topic, number) for number in sorted(numbers)]


def in_flight(seen: Mapping[TopicPartition, Seen], owners: Owners) -> int:
    """Return the number of delivered and unfinished records. Without a member, nobody has any."""
    return 0 if owners.unused else sum(len(each.partition.open) for each in seen.values())
