"""A log in one topic: appended by an idempotent producer, read from its start without a group."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING
from zlib import crc32

from qtasks_core import Guarantees
from qtasks_core.errors import Closed, ConfigurationError, Unavailable
from qtasks_kafka.connection import REQUEST, Connection, close_consumer, topic_name
from qtasks_log import Entry, Log

if TYPE_CHECKING:
    from aiokafka import AIOKafkaConsumer
    from aiokafka.structs import TopicPartition

logger = logging.getLogger(__name__)

QUIET = 0.5
"""Seconds after which a read without entries looks whether the log's end moved all the same."""


class KafkaLog(Log):
    """The topic `NAMESPACE.records`. A mark is the end of each partition."""

    def __init__(self, url: str, *, partitions: int = 8, replicas: int | None = None) -> None:
        if partitions < 1:
            raise ConfigurationError("partitions must be above 0")
        self._connection = Connection(url, partitions=partitions, replicas=replicas)
        self._topic = ""
        self._partitions = 0
        self._consumer: AIOKafkaConsumer | None = None
        self._asker: AIOKafkaConsumer | None = None
        """Asks for the log's end: on the reader's connection it would wait behind a long poll."""
        self._opening = asyncio.Lock()
        self._positions: dict[TopicPartition, int] = {}

    @property
    def guarantees(self) -> Guarantees:
        return Guarantees(
            part="KafkaStorage",
            server="Apache Kafka",
            survives="machine crash",
            durability="acks=all with an idempotent producer; on how many machines say the "
            "topic's replication factor and min.insync.replicas, of one the page cache",
            notes=("every process reads the whole topic at its start and keeps it in memory",),
        )

    @property
    def compacts(self) -> bool:
        return False

    async def start(self, namespace: str) -> None:
        await self.stop()
        self._topic = topic_name(namespace, "records")
        self._positions = {}
        try:
            await self._connection.start()
            await self._connection.ensure([self._topic])
            assert self._connection.writer is not None
            self._partitions = await self._connection.writer.partitions(self._topic)
            await self._open()
        except BaseException:
            await self.stop()
            raise

    async def _open(self) -> AIOKafkaConsumer:
        """Return the consumer; a new one goes on behind what was read."""
        if not self._partitions:
            raise Closed("KafkaLog is not started")
        async with self._opening:
            if self._consumer is None:
                self._consumer = await self._begin()
            return self._consumer

    async def _begin(self) -> AIOKafkaConsumer:
        consumer = self._connection.consumer(group_id=None, fetch_max_wait_ms=500)
        from aiokafka.structs import TopicPartition

        try:
            with self._connection.reaching():
                async with asyncio.timeout(REQUEST):
                    if self._asker is None:
                        self._asker = self._connection.consumer(group_id=None)
                        await self._asker.start()
                    await consumer.start()
                    consumer.assign(
                        [TopicPartition(self._topic, p) for p in range(self._partitions)]
                    )
                    first = await consumer.beginning_offsets(consumer.assignment())
        except BaseException:
            asker, self._asker = self._asker, None
            for opened in (consumer, asker):
                if opened is not None:
                    await close_consumer(opened)
            raise
        for tp, offset in first.items():
            self._positions[tp] = max(offset, self._positions.get(tp, 0))
            consumer.seek(tp, self._positions[tp])
        return consumer

    async def stop(self) -> None:
        consumers, self._consumer, self._asker = (self._consumer, self._asker), None, None
        self._partitions = 0
        for consumer in consumers:
            if consumer is not None:
                await close_consumer(consumer)
        await self._connection.stop()

    async def append(self, entries: Sequence[Entry]) -> list[str | None]:
        from qtasks_kafka.writer import Record

        writer = self._connection.writer
        if writer is None or not self._partitions:
            raise Closed("KafkaLog is not started")
        await self._connection.ensure([self._topic])
        written = await writer.write(
            [
                Record(
                    self._topic,
                    entry.value,
                    f"{entry.partition_key}\n{entry.key}".encode(),
                    partition=crc32(entry.partition_key.encode()) % self._partitions,
                )
                for entry in entries
            ]
        )
        for outcome in written:
            if isinstance(outcome.refused, ConfigurationError):
                raise outcome.refused
        return [None if w.refused is None else str(w.refused) for w in written]

    async def read(self) -> list[Entry]:
        consumer = await self._open()
        from aiokafka.errors import KafkaError

        while True:
            try:
                batches = await consumer.getmany(timeout_ms=int(QUIET * 1000))
            except KafkaError as error:
                if self._consumer is consumer:
                    self._consumer = None
                    await close_consumer(consumer)
                raise self._connection.translated(error) from error
            if self._consumer is not consumer:
                raise Unavailable("the log was closed while it was read")
            if batches:
                return self._entries(batches)
            if await self._moved(consumer):
                return []

    def _entries(self, batches: dict[TopicPartition, list[object]]) -> list[Entry]:
        entries = []
        for tp, records in batches.items():
            for record in records:
                self._positions[tp] = record.offset + 1  # type: ignore[attr-defined]
                partition_key, _, key = (record.key or b"").decode(errors="replace").partition("\n")  # type: ignore[attr-defined]
                entries.append(Entry(partition_key, key, record.value))  # type: ignore[attr-defined]
        return entries

    async def _moved(self, consumer: AIOKafkaConsumer) -> bool:
        """Follow the driver over offsets that hold no record, and say whether there were any."""
        moved = False
        for tp in consumer.assignment():
            position = await consumer.position(tp)
            moved |= position > self._positions[tp]
            self._positions[tp] = max(position, self._positions[tp])
        return moved

    async def mark(self) -> object:
        consumer = await self._open()
        if self._asker is None:
            raise Unavailable("the log is being opened anew")
        with self._connection.reaching():
            async with asyncio.timeout(REQUEST):
                partitions = consumer.assignment()
                ends: dict[TopicPartition, int] = await self._asker.end_offsets(partitions)
        return ends

    def reached(self, mark: object) -> bool:
        assert isinstance(mark, dict)
        return all(self._positions.get(tp, 0) >= end for tp, end in mark.items())
