"""A log on one Kafka topic: an idempotent producer appends, readers start at the beginning."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from zlib import crc32

import msgspec
from msgspec import Struct
from uuid_utils import uuid7

from qtasks_core import Guarantees
from qtasks_core.errors import Closed, ConfigurationError, Unavailable
from qtasks_kafka.connection import LONG_POLL_MS, Connection, close_consumer, topic_name
from qtasks_kafka.settings import REQUEST
from qtasks_log import Entry, Log

if TYPE_CHECKING:
    from aiokafka import AIOKafkaConsumer
    from aiokafka.structs import TopicPartition

logger = logging.getLogger("qtasks.kafka")

QUIET = 0.5
"""Seconds after which a read without entries checks whether the log's end has moved."""


BESIDE = 1024
"""Bytes in a batch besides the record's value: its key, and the overhead of both."""
LAYOUT_KEY = b"\nlayout"


class Layout(Struct, frozen=True):
    """How entries are distributed over partitions. The first such record in a log fixes it.

    An entry's partition follows from its uuid and a number of partitions. The topic's own number
    may grow. If writers used that, they would send entries of one uuid to different partitions.
    Readers would then disagree on their order.
    """

    partitions: int
    id: str
    """Identifies this log. If the topic was deleted and created again, the id differs."""


class KafkaLog(Log):
    """The topic `NAMESPACE.records`. A mark is the end of each partition."""

    def __init__(self, url: str, *, partitions: int = 8, replicas: int | None = None) -> None:
        self._url = url
        self._partitions = partitions
        self._replicas = replicas
        self._connection = self._connect()
        self._topic = ""
        self._running = False
        self._layout: Layout | None = None
        self._consumer: AIOKafkaConsumer | None = None
        self._asker: AIOKafkaConsumer | None = None
        """Asks for the log's end. On the reader's connection, it would wait behind a long poll."""
        self._opening: asyncio.Task[AIOKafkaConsumer] | None = None
        """One attempt for all callers. Separate attempts would add up their timeouts."""
        self._positions: dict[TopicPartition, int] = {}
        self._retired: set[asyncio.Task[None]] = set()

    def _connect(self) -> Connection:
        return Connection(self._url, partitions=self._partitions, replicas=self._replicas)

    @property
    def guarantees(self) -> Guarantees:
        largest = self._connection.largest(self._topic)
        return Guarantees(
            part="KafkaStorage",
            server="Apache Kafka",
            survives="machine crash",
            durability="acks=all with an idempotent producer; on how many machines say the "
            "topic's replication factor and min.insync.replicas, of one the page cache",
            largest=None if largest is None else largest - BESIDE,
        )

    @property
    def compacts(self) -> bool:
        return False

    async def migrate(self, namespace: str) -> list[str]:
        connection = self._connect()
        try:
            await connection.start()
            created = await connection.ensure([topic_name(namespace, "records")])
        finally:
            await connection.stop()
        # The first start writes the layout.
        log = KafkaLog(self._url, partitions=self._partitions, replicas=self._replicas)
        try:
            await log.start(namespace)
        finally:
            await log.stop()
        return [f"topic {topic} created" for topic in created]

    async def start(self, namespace: str) -> None:
        await self.stop()
        self._topic = topic_name(namespace, "records")
        self._layout, self._positions = None, {}
        try:
            await self._connection.start()
            self._running = True
            await self._open()
        except BaseException:
            await self.stop()
            raise

    async def _open(self) -> AIOKafkaConsumer:
        """Return the consumer. A new one continues after the last read record."""
        if not self._running:
            raise Closed("KafkaLog is not started")
        if self._consumer is not None:
            return self._consumer
        if self._opening is None:
            self._opening = asyncio.create_task(self._begin())
            self._opening.add_done_callback(self._opened)
        opening = self._opening
        # Do not await the task itself: a cancellation of this call would cancel it for others.
        await asyncio.wait({opening})
        if opening.cancelled() and not self._running:
            raise Closed("KafkaLog was stopped")
        if opening.cancelled():  # by the driver
            raise Unavailable("the log could not be opened")
        return opening.result()

    def _opened(self, opening: asyncio.Task[AIOKafkaConsumer]) -> None:
        self._opening = None
        if not opening.cancelled():
            # Mark the error as retrieved, even if every caller was cancelled meanwhile.
            opening.exception()

    async def _begin(self) -> AIOKafkaConsumer:
        """Open the log at its last position, or a new log that has replaced it."""
        # If offsets are gone, the topic was created again or truncated. This method checks that.
        consumer = self._connection.consumer(
            group_id=None, fetch_max_wait_ms=LONG_POLL_MS, auto_offset_reset="none"
        )
        asker = self._connection.consumer(group_id=None)
        try:
            with self._connection.reaching():
                async with asyncio.timeout(REQUEST) as deadline:
                    self._connection.forget_topics()
                    await self._connection.ensure([self._topic])
                    await asker.start()
                    await consumer.start()
                    layout = await self._find_layout(consumer, deadline)
                    if layout != self._layout:
                        if self._layout is not None:
                            logger.warning("the topic %s was recreated", self._topic)
                        self._layout, self._positions = layout, {}
                    await self._seek(consumer, layout)
        except BaseException:
            self._close(consumer, asker)
            raise
        self._consumer, self._asker = consumer, asker
        return consumer

    async def _find_layout(self, consumer: AIOKafkaConsumer, deadline: asyncio.Timeout) -> Layout:
        """Return the log's first layout. Write one if none exists.

        It is the first record, unless the topic is older than layouts. In that case the scan may
        take long.
        """
        clock = asyncio.get_running_loop().time
        from aiokafka.structs import TopicPartition

        from qtasks_kafka.writer import Record

        writer = self._connection.writer
        if writer is None:
            raise Closed("KafkaLog is not started")
        place = TopicPartition(self._topic, 0)
        consumer.assign([place])
        while True:
            first = (await consumer.beginning_offsets([place]))[place]
            end = (await consumer.end_offsets([place]))[place]
            consumer.seek(place, first)
            while await consumer.position(place) < end:
                for records in (await consumer.getmany(timeout_ms=1000)).values():
                    deadline.reschedule(clock() + REQUEST)
                    for record in records:
                        if (layout := _layout_of(record)) is not None:
                            return layout
            made = Layout(await writer.partitions(self._topic), uuid7().hex)
            value = msgspec.json.encode(made)
            await writer.write([Record(self._topic, value, LAYOUT_KEY, partition=0)])

    async def _seek(self, consumer: AIOKafkaConsumer, layout: Layout) -> None:
        """Continue after the last read records, as far as they still exist."""
        from aiokafka.structs import TopicPartition

        places = [TopicPartition(self._topic, number) for number in range(layout.partitions)]
        consumer.assign(places)
        first = await consumer.beginning_offsets(places)
        ends = await consumer.end_offsets(places)
        for place in places:
            position = max(first[place], self._positions.get(place, 0))
            self._positions[place] = min(position, ends[place])
            consumer.seek(place, self._positions[place])

    async def stop(self) -> None:
        self._running = False
        if self._opening is not None:
            self._opening.cancel()
            await asyncio.wait({self._opening})
        self._retire()
        if self._retired:
            await asyncio.wait(self._retired)
        await self._connection.stop()

    def _retire(self) -> None:
        """Give up the consumers. The next call opens the log again. `stop` waits for them."""
        consumers, self._consumer, self._asker = (self._consumer, self._asker), None, None
        self._close(*consumers)

    def _close(self, *consumers: AIOKafkaConsumer | None) -> None:
        """Close consumers in the background: if the server does not answer, it takes seconds."""
        for consumer in consumers:
            if consumer is not None:
                closing = asyncio.create_task(close_consumer(consumer))
                self._retired.add(closing)
                closing.add_done_callback(self._retired.discard)

    async def append(self, entries: Sequence[Entry]) -> list[str | None]:
        from qtasks_kafka.writer import Record

        await self._open()
        writer, layout = self._connection.writer, self._layout
        if writer is None or layout is None:
            raise Closed("KafkaLog is not started")
        records = [
            Record(
                self._topic,
                entry.value,
                f"{entry.partition_key}\n{entry.key}".encode(),
                partition=crc32(entry.partition_key.encode()) % layout.partitions,
            )
            for entry in entries
        ]
        try:
            await self._connection.ensure([self._topic])
            written = await writer.write(records)
        except Unavailable:
            self._retire()
            raise
        for outcome in written:
            if isinstance(outcome.refused, ConfigurationError):
                raise outcome.refused
        return [None if w.refused is None else str(w.refused) for w in written]

    async def read(self) -> list[Entry]:
        consumer = await self._open()
        while True:
            try:
                with self._connection.reaching():
                    batches = await consumer.getmany(timeout_ms=int(QUIET * 1000))
                    if not batches and await self._moved(consumer):
                        return []
            except asyncio.CancelledError:
                raise
            except BaseException:
                # The driver's position is already after the records it took. The next consumer
                # reads them again.
                if self._consumer is consumer:
                    self._retire()
                raise
            if self._consumer is not consumer:
                raise Unavailable("the log was reopened while it was read")
            if batches:
                return self._entries(batches)

    def _entries(self, batches: dict[TopicPartition, list[object]]) -> list[Entry]:
        entries = []
        for tp, records in batches.items():
            for record in records:
                self._positions[tp] = record.offset + 1  # type: ignore[attr-defined]
                if record.key == LAYOUT_KEY:  # type: ignore[attr-defined]
                    continue
                name = (record.key or b"").decode(errors="replace")  # type: ignore[attr-defined]
                # Split at the last line feed: a uuid may contain line feeds.
                partition_key, _, key = name.rpartition("\n")
                entries.append(Entry(partition_key, key, record.value))  # type: ignore[attr-defined]
        return entries

    async def _moved(self, consumer: AIOKafkaConsumer) -> bool:
        """Follow the driver over offsets without a record. Return whether there were any."""
        moved = False
        for tp in consumer.assignment():
            position = await consumer.position(tp)
            moved |= position > self._positions[tp]
            self._positions[tp] = max(position, self._positions[tp])
        return moved

    async def mark(self) -> object:
        consumer = await self._open()
        asker = self._asker
        if asker is None:
            raise Unavailable("the log is being reopened")
        read = dict(self._positions)  # `read` continues meanwhile
        try:
            with self._connection.reaching():
                async with asyncio.timeout(REQUEST):
                    places = consumer.assignment()
                    ends: dict[TopicPartition, int] = await asker.end_offsets(places)
        except Unavailable:
            self._retire()
            raise
        if any(end < read.get(place, 0) for place, end in ends.items()):
            self._retire()
            raise Unavailable("the log is shorter than it was; it is being reopened")
        return ends

    def reached(self, mark: object) -> bool:
        assert isinstance(mark, dict)
        return all(self._positions.get(tp, 0) >= end for tp, end in mark.items())


def _layout_of(record: Any) -> Layout | None:
    """Return the layout in a record, or None if the record has no valid layout."""
    if record.key != LAYOUT_KEY:
        return None
    try:
        layout = msgspec.json.decode(record.value or b"", type=Layout)
    except msgspec.MsgspecError:
        return None
    return layout if layout.partitions > 0 else None
