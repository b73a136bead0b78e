"""A log on one compacted Kafka topic: an idempotent producer appends, every process reads it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple
from zlib import crc32

import msgspec
from msgspec import Struct
from uuid_utils import uuid7

from qtasks_core import Guarantees
from qtasks_core.errors import Closed, ConfigurationError, Unavailable
from qtasks_kafka.connection import LONG_POLL_MS, Connection, close_consumer, topic_name
from qtasks_kafka.settings import REQUEST
from qtasks_log import Entry, Log, Replaced

if TYPE_CHECKING:
    from aiokafka import AIOKafkaConsumer
    from aiokafka.structs import TopicPartition

    from qtasks_kafka.writer import Record

logger = logging.getLogger("qtasks.kafka")

QUIET = 0.5
"""Seconds after which a read without entries checks whether the log's end has moved."""
ASKING_MS = 10
"""Milliseconds that a question may wait behind the search for the layout on the same connection."""

BESIDE = 1024
"""Bytes in a batch besides the record's value: its key, and the overhead of both."""
LAYOUT_KEY = b"\nlayout"
"""How the key of a layout begins. Each has its own key, so that compaction leaves the first one."""
AT_ONCE = 2000
"""Entries that one `read` returns at most."""
HOUR = 3600.0
COMPACTED = {
    "cleanup.policy": "compact",
    # Kafka never compacts the segment that is being written.
    "segment.bytes": str(16 * 1024 * 1024),
    # A reader must have read an entry before it is compacted. A process that was frozen for longer
    # than half of it reads the log anew.
    "min.compaction.lag.ms": str(int(HOUR * 1000)),
}
"""Settings of new topics, beside those of every topic."""
_POLICY = ("cleanup.policy", "delete.retention.ms", "min.compaction.lag.ms")


class Layout(Struct, frozen=True):
    """How entries are distributed over partitions. The first such record in a log fixes it.

    An entry's partition follows from its uuid and a number of partitions. The topic's own number
    may grow. If writers used that, they would send entries of one uuid to different partitions.
    Readers would then disagree on their order.
    """

    partitions: int
    id: str
    """Identifies this log. If the topic was deleted and created again, the id differs."""


class Policy(Struct, frozen=True):
    """How the server cleans the topic. Times are in seconds; 0: this user may not read them."""

    compacts: bool = True
    keeps_tombstones: float = 0.0
    compacts_after: float = 0.0


class Position(Struct, frozen=True, array_like=True):
    """Up to where a process has read which log."""

    id: str
    complete: float
    """The last Unix time of which it has read all that was written before."""
    offsets: list[int]


class Mark(NamedTuple):
    """The ends of all partitions, and a Unix time before they were asked for."""

    at: float
    ends: dict[TopicPartition, int]


class KafkaLog(Log):
    """The topic `NAMESPACE.records`. A mark is the end of each partition.

    An entry of a transaction is read once that has committed, and so is what comes after it in its
    partition, whoever wrote that. The end of a partition is where its first open transaction
    begins. A transaction that its owner leaves open delays those who save, and nobody who reads:
    what counts has been read back, so it is before that end.
    """

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
        """Asks for offsets. On the reader's connection, it would wait behind a long poll."""
        self._opening: asyncio.Task[AIOKafkaConsumer] | None = None
        """One attempt for all callers. Separate attempts would add up their timeouts."""
        self._positions: dict[TopicPartition, int] = {}
        self._polled = 0.0
        """When the log was read last, as Unix time: a clock that goes on while a machine sleeps."""
        self._complete = 0.0
        """The last Unix time of which all is read that was written before."""
        self._replaced = ""
        """Why the reader has to forget what it has read, until it seeks."""
        self._policy = Policy()
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
            advice=self._connection.advice,
        )

    @property
    def compacts(self) -> bool:
        return self._policy.compacts

    async def migrate(self, namespace: str) -> list[str]:
        connection = self._connect()
        try:
            await connection.start()
            created = await connection.ensure([topic_name(namespace, "records")], COMPACTED)
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
        self._layout, self._positions, self._replaced = None, {}, ""
        self._polled = self._complete = 0.0
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
        asker = self._connection.consumer(group_id=None, fetch_max_wait_ms=ASKING_MS)
        try:
            with self._connection.reaching():
                async with asyncio.timeout(REQUEST) as deadline:
                    self._connection.forget_topics()
                    await self._connection.ensure([self._topic], COMPACTED)
                    await asker.start()
                    await consumer.start()
                    layout = await self._find_layout(asker, deadline)
                    self._policy = await self._read_policy()
                    if self._layout is not None and layout != self._layout:
                        self._replace(f"the topic {self._topic} was recreated")
                    self._layout = layout
                    if not await self._seek(consumer, asker, layout, self._positions):
                        self._replace(f"entries of the topic {self._topic} are gone")
                    self._check_pause()
        except BaseException:
            self._close(consumer, asker)
            raise
        self._consumer, self._asker = consumer, asker
        return consumer

    async def _find_layout(self, asker: AIOKafkaConsumer, deadline: asyncio.Timeout) -> Layout:
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
        asker.assign([place])
        while True:
            first = (await asker.beginning_offsets([place]))[place]
            end = (await asker.end_offsets([place]))[place]
            asker.seek(place, first)
            while await asker.position(place) < end:
                for records in (await asker.getmany(timeout_ms=1000)).values():
                    deadline.reschedule(clock() + REQUEST)
                    for record in records:
                        if (layout := _layout_of(record)) is not None:
                            asker.unsubscribe()
                            return layout
            made = Layout(await writer.partitions(self._topic), uuid7().hex)
            value = msgspec.json.encode(made)
            key = LAYOUT_KEY + made.id.encode()
            await writer.write([Record(self._topic, value, key, partition=0)])

    async def _read_policy(self) -> Policy:
        from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType

        topic = ConfigResource(ConfigResourceType.TOPIC, self._topic, dict.fromkeys(_POLICY))
        for answer in await self._connection.started().describe_configs([topic]):
            for code, _, _, _, entries in answer.resources:
                if code == 0:
                    settings = {name: value for name, value, *_ in entries}
                    policy = Policy(
                        "compact" in settings["cleanup.policy"],
                        int(settings["delete.retention.ms"]) / 1000,
                        int(settings["min.compaction.lag.ms"]) / 1000,
                    )
                    if not policy.compacts:
                        logger.warning(
                            "the topic %s grows for ever: set its cleanup.policy to compact, "
                            "and its min.compaction.lag.ms to %s",
                            self._topic, COMPACTED["min.compaction.lag.ms"],
                        )  # fmt: skip
                    elif not policy.compacts_after:
                        logger.warning(
                            "the topic %s may be compacted before it is read: "
                            "set its min.compaction.lag.ms to %s",
                            self._topic, COMPACTED["min.compaction.lag.ms"],
                        )  # fmt: skip
                    return policy
        return Policy()

    async def _seek(
        self,
        consumer: AIOKafkaConsumer,
        asker: AIOKafkaConsumer,
        layout: Layout,
        positions: Mapping[TopicPartition, int],
    ) -> bool:
        """Go on at these positions, and at the beginning of other partitions.

        Return whether all positions are in the log. If not, go on at the beginning.
        """
        from aiokafka.structs import TopicPartition

        places = [TopicPartition(self._topic, number) for number in range(layout.partitions)]
        consumer.assign(places)
        first = await asker.beginning_offsets(places)
        ends = await asker.end_offsets(places)
        fits = all(first[p] <= positions[p] <= ends[p] for p in places if p in positions)
        self._positions = {p: (fits and positions.get(p)) or first[p] for p in places}
        for place, position in self._positions.items():
            consumer.seek(place, position)
        return fits

    def _replace(self, why: str) -> None:
        """Make the reader forget what it has read."""
        self._replaced = why
        self._positions, self._complete = {}, 0.0

    def _check_pause(self) -> None:
        """Make the reader begin again if entries that it has not read may be compacted by now."""
        now, lag = time.time(), self._policy.compacts_after
        if self._policy.compacts and lag and self._polled and now - self._polled > lag / 2:
            self._replace(f"it was not read for {now - self._polled:.0f} s")
        self._polled = now

    @property
    def position(self) -> bytes:
        layout = self._layout
        assert layout is not None
        offsets = {place.partition: offset for place, offset in self._positions.items()}
        ordered = [offsets.get(number, 0) for number in range(layout.partitions)]
        return msgspec.msgpack.encode(Position(layout.id, self._complete, ordered))

    async def seek(self, position: bytes | None) -> bool:
        from aiokafka.structs import TopicPartition

        consumer, asker, layout = await self._open(), self._asker, self._layout
        if asker is None:
            raise Unavailable("the log is being reopened")
        assert layout is not None
        self._replaced, self._complete = "", 0.0
        wanted: dict[TopicPartition, int] = {}
        if position is not None:
            at = msgspec.msgpack.decode(position, type=Position)
            # Kafka forgets tombstones some time after it has compacted them. A reader from before
            # would keep what they have deleted. It has an hour to read the rest. What counts is
            # when it was at the end of the log: tombstones behind its position may be older than
            # the position.
            age = time.time() - at.complete
            remembered = not self.compacts or 0 <= age < self._policy.keeps_tombstones - HOUR
            if at.id == layout.id and remembered and len(at.offsets) == layout.partitions:
                wanted = {TopicPartition(self._topic, n): o for n, o in enumerate(at.offsets)}
                self._complete = at.complete
        self._polled = time.time()
        try:
            with self._connection.reaching():
                async with asyncio.timeout(REQUEST):
                    fits = await self._seek(consumer, asker, layout, wanted)
        except BaseException:
            self._retire()
            raise
        if position is None or (fits and wanted):
            return True
        self._complete = 0.0
        return False

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

    async def records(self, entries: Sequence[Entry]) -> list[Record]:
        """Return the records that append entries to this log."""
        from qtasks_kafka.writer import Record

        await self._open()
        layout = self._layout
        if layout is None:
            raise Closed("KafkaLog is not started")
        return [
            Record(
                self._topic,
                entry.value,
                f"{entry.partition_key}\n{entry.key}".encode(),
                partition=crc32(entry.partition_key.encode()) % layout.partitions,
            )
            for entry in entries
        ]

    async def append(self, entries: Sequence[Entry]) -> list[str | None]:
        records = await self.records(entries)
        writer = self._connection.running_writer()
        try:
            await self._connection.ensure([self._topic], COMPACTED)
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
            self._check_pause()
            if self._replaced:
                raise Replaced(self._replaced)
            try:
                with self._connection.reaching():
                    batches = await consumer.getmany(
                        timeout_ms=int(QUIET * 1000), max_records=AT_ONCE
                    )
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
                entries = self._entries(batches)
                # The marks of transactions are not returned, but they are before the next mark.
                await self._moved(consumer, batches)
                return entries

    def _entries(self, batches: dict[TopicPartition, list[object]]) -> list[Entry]:
        entries = []
        for records in batches.values():
            for record in records:
                name = (record.key or b"").decode(errors="replace")  # type: ignore[attr-defined]
                if name.startswith("\nlayout"):
                    continue
                # Split at the last line feed: a uuid may contain line feeds.
                partition_key, _, key = name.rpartition("\n")
                entries.append(Entry(partition_key, key, record.value))  # type: ignore[attr-defined]
        return entries

    async def _moved(
        self, consumer: AIOKafkaConsumer, places: Iterable[TopicPartition] | None = None
    ) -> bool:
        """Follow the driver over what it has read. Return whether it has gone on."""
        moved = False
        for tp in consumer.assignment() if places is None else places:
            position = await consumer.position(tp)
            moved |= position > self._positions[tp]
            self._positions[tp] = max(position, self._positions[tp])
        return moved

    async def mark(self) -> object:
        consumer = await self._open()
        asker = self._asker
        if asker is None:
            raise Unavailable("the log is being reopened")
        read, at = dict(self._positions), time.time()  # `read` continues meanwhile
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
        return Mark(at, ends)

    def reached(self, mark: object) -> bool:
        assert isinstance(mark, Mark)
        if self._replaced or any(self._positions.get(p, 0) < end for p, end in mark.ends.items()):
            return False
        self._complete = max(self._complete, mark.at)
        return True


def _layout_of(record: Any) -> Layout | None:
    """Return the layout in a record, or None if the record has no valid layout."""
    if not (record.key or b"").startswith(LAYOUT_KEY):
        return None
    try:
        layout = msgspec.json.decode(record.value or b"", type=Layout)
    except msgspec.MsgspecError:
        return None
    return layout if layout.partitions > 0 else None
