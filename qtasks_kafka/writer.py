"""Durable appends: one idempotent producer that writes whole batches, replaced when it is stuck."""

from __future__ import annotations

import asyncio
import logging
from asyncio import Future
from collections.abc import Sequence
from contextlib import AbstractContextManager
from itertools import count, zip_longest
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from qtasks_core.errors import ConfigurationError, PayloadTooLarge, QTasksError, Unavailable
from qtasks_kafka.settings import REQUEST

if TYPE_CHECKING:
    from aiokafka import AIOKafkaProducer

logger = logging.getLogger("qtasks.kafka")

BATCH_OVERHEAD = 128
"""Bytes of a batch and a record beside key, value and headers, rounded up."""
_TOO_LARGE = {"MessageSizeTooLargeError", "RecordTooLargeError", "RecordListTooLargeError"}


class Record(NamedTuple):
    """One record to append. Without a partition the records of a call are dealt out evenly."""

    topic: str
    value: bytes | None
    key: bytes | None = None
    headers: tuple[tuple[str, bytes], ...] = ()
    partition: int | None = None

    @property
    def size(self) -> int:
        """Bytes that a batch of this record alone has, rounded up."""
        headers = sum(len(name) + len(value) + 10 for name, value in self.headers)
        return BATCH_OVERHEAD + len(self.key or b"") + len(self.value or b"") + headers


class Written(NamedTuple):
    """What became of one record."""

    refused: QTasksError | None
    """Why the server does not take it: `PayloadTooLarge` or `ConfigurationError`. None when it is
    durable."""
    timestamp: int
    """Milliseconds of the server's clock, on a topic with LogAppendTime; else -1."""


class Cluster(Protocol):
    """What a writer asks of its connection."""

    def started(self) -> object:
        """Raise `Closed` before the start and after the stop."""

    def producer(self) -> Any:
        """Build a producer, not started."""

    def reaching(self) -> AbstractContextManager[None]:
        """Turn what the driver raises into the errors of the contracts."""

    def translated(self, error: BaseException) -> QTasksError:
        """Return the error of the contracts for one of the driver's."""

    def largest(self, topic: str) -> int | None:
        """Return the bytes that a batch of this topic may have; None while that is unknown."""

    def forget_topics(self, *topics: str) -> None:
        """Look again at these topics, or at all, before their next use."""


class Writer:
    """Appends records. Calls may run concurrently; each is one wait for the server."""

    def __init__(self, connection: Cluster) -> None:
        self._connection = connection
        self._producer: AIOKafkaProducer | None = None
        self._starting = asyncio.Lock()
        self._turn = count()
        self._single: set[str] = set()
        """Topics whose limit is unknown and lower than a full batch: each record goes alone."""
        self._dropping: set[asyncio.Task[None]] = set()

    async def stop(self) -> None:
        """Close the producer; what is not written yet stays unwritten."""
        self._drop(self._producer)
        if self._dropping:
            await asyncio.wait(self._dropping)

    def _drop(self, producer: AIOKafkaProducer | None) -> None:
        """Give up this producer; the next call has a new one. `stop` awaits the end of the old."""
        if producer is not None and self._producer is producer:
            self._producer = None
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

        Records of one partition keep their order, unless the server refuses some of them. Raises
        `Unavailable`: some may be written.
        """
        written: list[Written | None] = [None] * len(records)
        producer: AIOKafkaProducer | None = None
        try:
            with self._connection.reaching():
                async with asyncio.timeout(REQUEST):
                    while None in written:
                        producer = await self._started()
                        await self._write(producer, records, written)
        except Unavailable:
            # An idempotent producer repeats a batch for ever. Were it kept, each repeat of this
            # call would add one more.
            self._connection.forget_topics()
            self._drop(producer)
            raise
        return [outcome for outcome in written if outcome is not None]

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

    async def _write(
        self,
        producer: AIOKafkaProducer,
        records: Sequence[Record],
        written: list[Written | None],
    ) -> None:
        """Send what has no outcome yet and note the outcomes; some may be left for another call."""
        batches = await self._batches(producer, records, written)
        futures: list[tuple[Future[Any], list[int]]] = []
        for (topic, partition), batch in batches:
            future = await producer.send_batch(batch.builder, topic, partition=partition)
            future.add_done_callback(_seen)
            futures.append((future, batch.members))
        if futures:
            await asyncio.wait([future for future, _ in futures])
        for future, members in futures:
            error = future.exception()
            if error is None:
                outcome: Written | None = Written(None, future.result().timestamp)
            else:
                # The server counts batches, and has not counted this one: what this producer sends
                # to that partition from now on would be out of order.
                self._drop(producer)
                outcome = self._refusal(error, [records[at] for at in members])
            for at in members:
                written[at] = outcome

    def _refusal(self, error: BaseException, records: Sequence[Record]) -> Written | None:
        """Return why records are refused, None when they must be sent again."""
        name = type(error).__name__
        if name == "OutOfOrderSequenceNumber":
            return None
        if name in _TOO_LARGE:
            self._connection.forget_topics()
            if len(records) == 1:
                return Written(_too_large(records[0], None), -1)
            # The limit is not known, or was lowered: each of them may fit by itself.
            self._single.update(record.topic for record in records)
            return None
        if isinstance(translated := self._connection.translated(error), ConfigurationError):
            return Written(translated, -1)
        raise error

    async def _batches(
        self, producer: AIOKafkaProducer, records: Sequence[Record], written: list[Written | None]
    ) -> list[tuple[tuple[str, int], Batch]]:
        """Pack records by partition; first batches come first, so that they share a request.

        What is larger than its topic takes is left out, and noted in `written`.
        """
        sizes: dict[str, int] = {}
        packed: dict[tuple[str, int], list[Batch]] = {}
        turn = next(self._turn)
        too_large: set[str] = set()
        for at, record in enumerate(records):
            if written[at] is not None:
                continue
            largest, size = self._connection.largest(record.topic), record.size
            if largest is not None and size > largest:
                written[at] = Written(_too_large(record, largest), -1)
                too_large.add(record.topic)
                continue
            if record.topic not in sizes:
                sizes[record.topic] = len(await producer.partitions_for(record.topic))
            partition = record.partition
            if partition is None:
                partition = (turn + at) % sizes[record.topic]
            elif partition >= sizes[record.topic]:
                raise Unavailable(f"the topic {record.topic} has fewer partitions than it had")
            batches = packed.setdefault((record.topic, partition), [])
            if (
                (largest is None and record.topic in self._single)
                or not batches
                or not batches[-1].append(record, at, size, largest)
            ):
                batches.append(Batch(producer.create_batch()))
                batches[-1].append(record, at, size, None)
        if too_large:
            # Somebody may raise the limit.
            self._connection.forget_topics(*too_large)
        rounds = zip_longest(*([(place, b) for b in some] for place, some in packed.items()))
        return [batch for some in rounds for batch in some if batch is not None]


class Batch:
    """Records that are sent together, and their places in the call."""

    def __init__(self, builder: Any) -> None:
        self.builder = builder
        self.members: list[int] = []
        self._size = 0

    def append(self, record: Record, at: int, size: int, largest: int | None) -> bool:
        """Add a record, unless the batch is full or would be larger than `largest` bytes."""
        if largest is not None and self._size + size > largest:
            return False
        taken = self.builder.append(
            timestamp=None, key=record.key, value=record.value, headers=list(record.headers)
        )
        if taken is None:
            return False
        self._size += size
        self.members.append(at)
        return True


def _too_large(record: Record, largest: int | None) -> PayloadTooLarge:
    limit = "" if largest is None else f" of {largest} bytes"
    return PayloadTooLarge(
        f"{record.size} bytes are more than the topic {record.topic} takes "
        f"(its max.message.bytes{limit})"
    )


def _seen(future: Future[Any]) -> None:
    """Look at the error of a batch whose writer was cancelled, so that it is not called unseen."""
    if not future.cancelled() and future.exception() is not None:
        logger.debug("a batch was not written: %r", future.exception())


async def _close(producer: AIOKafkaProducer) -> None:
    """Close a producer at once: its own `stop` first waits until everything is written."""
    producer._closed = True
    await producer._sender.close()  # Waits for the answers under way, or until they are overdue.
    await producer.client.close()
