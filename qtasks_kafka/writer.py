"""Durable appends: one idempotent producer that writes whole batches, replaced when it is stuck."""

from __future__ import annotations

import asyncio
import logging
from asyncio import Future
from collections.abc import Sequence
from itertools import count, zip_longest
from typing import TYPE_CHECKING, Any, NamedTuple

from qtasks_core.errors import ConfigurationError, Unavailable
from qtasks_kafka.connection import REQUEST, Connection

if TYPE_CHECKING:
    from aiokafka import AIOKafkaProducer

logger = logging.getLogger(__name__)

_TOO_LARGE = {"MessageSizeTooLargeError", "RecordTooLargeError", "RecordListTooLargeError"}


class Record(NamedTuple):
    """One record to append. Without a partition the records of a call are dealt out evenly."""

    topic: str
    value: bytes | None
    key: bytes | None = None
    headers: tuple[tuple[str, bytes], ...] = ()
    partition: int | None = None


class Written(NamedTuple):
    """What became of one record."""

    refused: str | None
    """Why the server does not take it; None when it is durable."""
    timestamp: int
    """Milliseconds of the server's clock, on a topic with LogAppendTime; else -1."""


class Writer:
    """Appends records. Calls may run concurrently; each is one wait for the server."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._producer: AIOKafkaProducer | None = None
        self._starting = asyncio.Lock()
        self._turn = count()
        self._dropping: set[asyncio.Task[None]] = set()

    async def stop(self) -> None:
        """Close the producer; what is not written yet stays unwritten."""
        self._drop()
        if self._dropping:
            await asyncio.wait(self._dropping)

    def _drop(self) -> None:
        """Give up the producer; the next call has a new one. `stop` awaits the end of the old."""
        producer, self._producer = self._producer, None
        if producer is not None:
            closing = asyncio.create_task(_close(producer))
            self._dropping.add(closing)
            closing.add_done_callback(self._dropping.discard)

    async def partitions(self, topic: str) -> int:
        """Return how many partitions a topic has. Raises `Unavailable`."""
        with self._connection.reaching():
            async with asyncio.timeout(REQUEST):
                producer = await self._started()
                return len(await producer.partitions_for(topic))

    async def write(self, records: Sequence[Record]) -> list[Written]:
        """Append records and say what became of each, durable when it returns.

        Records of one partition keep their order. Raises `Unavailable`: some may be written.
        """
        producer: AIOKafkaProducer | None = None
        try:
            with self._connection.reaching():
                async with asyncio.timeout(REQUEST):
                    producer = await self._started()
                    return await self._write(producer, records)
        except Unavailable:
            # An idempotent producer repeats a batch for ever. Were it kept, each repeat of this
            # call would add one more.
            self._connection.forget_topics()
            if producer is not None and self._producer is producer:
                self._drop()
            raise

    async def _started(self) -> AIOKafkaProducer:
        self._connection.started()
        async with self._starting:
            if self._producer is None:
                producer = self._connection.producer()
                try:
                    await producer.start()
                except BaseException:
                    await _close(producer)
                    raise
                self._producer = producer
            return self._producer

    async def _write(self, producer: AIOKafkaProducer, records: Sequence[Record]) -> list[Written]:
        batches = await self._batches(producer, records)
        futures: list[tuple[Future[Any], list[int]]] = []
        for (topic, partition), builder, members in batches:
            future = await producer.send_batch(builder, topic, partition=partition)
            future.add_done_callback(_seen)
            futures.append((future, members))
        written: list[Written] = [Written(None, -1)] * len(records)
        if futures:
            await asyncio.wait([future for future, _ in futures])
        for future, members in futures:
            outcome = self._outcome(future)
            for at in members:
                written[at] = outcome
        return written

    def _outcome(self, future: Future[Any]) -> Written:
        error = future.exception()
        if error is None:
            return Written(None, future.result().timestamp)
        if type(error).__name__ in _TOO_LARGE:
            return Written("larger than the topic's max.message.bytes", -1)
        if isinstance(translated := self._connection.translated(error), ConfigurationError):
            return Written(str(translated), -1)
        raise error

    async def _batches(
        self, producer: AIOKafkaProducer, records: Sequence[Record]
    ) -> list[tuple[tuple[str, int], Any, list[int]]]:
        """Pack records by partition; first batches come first, so that they share a request."""
        sizes: dict[str, int] = {}
        packed: dict[tuple[str, int], list[tuple[Any, list[int]]]] = {}
        turn = next(self._turn)
        for at, record in enumerate(records):
            partition = record.partition
            if partition is None:
                if record.topic not in sizes:
                    sizes[record.topic] = len(await producer.partitions_for(record.topic))
                partition = (turn + at) % sizes[record.topic]
            batches = packed.setdefault((record.topic, partition), [])
            if not batches or not _append(batches[-1][0], record):
                batches.append((producer.create_batch(), []))
                _append(batches[-1][0], record)
            batches[-1][1].append(at)
        rounds = zip_longest(*([(place, *b) for b in some] for place, some in packed.items()))
        return [batch for some in rounds for batch in some if batch is not None]


def _append(builder: Any, record: Record) -> bool:
    taken = builder.append(
        timestamp=None, key=record.key, value=record.value, headers=list(record.headers)
    )
    return taken is not None


def _seen(future: Future[Any]) -> None:
    """Look at the error of a batch whose writer was cancelled, so that it is not called unseen."""
    if not future.cancelled() and future.exception() is not None:
        logger.debug("a batch was not written: %r", future.exception())


async def _close(producer: AIOKafkaProducer) -> None:
    """Close a producer at once: its own `stop` first waits until everything is written."""
    producer._closed = True
    await producer._sender.close()  # Waits for the answers under way, or until they are overdue.
    await producer.client.close()
