"""Durable appends: one idempotent producer writes whole batches, and is replaced if it is stuck."""

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

CLOSING = REQUEST + 1.0
"""Seconds that a producer may take to close, before it is cancelled once more."""
BATCH_OVERHEAD = 128
"""Bytes of a batch and a record besides key, value and headers, rounded up."""
TOO_LARGE = {"MessageSizeTooLargeError", "RecordTooLargeError", "RecordListTooLargeError"}


class Record(NamedTuple):
    """One record to append. Without a partition, the records of a call are distributed evenly."""

    topic: str
    value: bytes | None
    key: bytes | None = None
    headers: tuple[tuple[str, bytes], ...] = ()
    partition: int | None = None

    @property
    def size(self) -> int:
        """The bytes of a batch with only this record, rounded up."""
        headers = sum(len(name) + len(value) + 10 for name, value in self.headers)
        return BATCH_OVERHEAD + len(self.key or b"") + len(self.value or b"") + headers


class Written(NamedTuple):
    """The outcome of one record."""

    refused: QTasksError | None
    """Why the server refuses it: `PayloadTooLarge` or `ConfigurationError`. None: it is durable."""
    timestamp: int = -1
    """Milliseconds of the server's clock, on a topic with LogAppendTime; else -1."""
    partition: int = -1
    offset: int = -1
    """The record's place in its topic; -1 if it was refused."""


class Cluster(Protocol):
    """The methods of the connection that a writer uses."""

    def started(self) -> object:
        """Raise `Closed` before the start and after the stop."""

    def producer(self, transactional_id: str | None = None) -> Any:
        """Return a new producer that is not started."""

    def reaching(self) -> AbstractContextManager[None]:
        """Translate the driver's errors into those of the contracts. Others pass unchanged."""

    def translated(self, error: BaseException) -> QTasksError:
        """Return the error of the contracts for an error of the driver."""

    def largest(self, topic: str) -> int | None:
        """Return the largest batch of this topic in bytes; None while it is unknown."""

    def forget_topics(self, *topics: str) -> None:
        """Check these topics again before their next use; without arguments, check all topics."""


class Writer:
    """Appends records. Calls may run concurrently. Each waits for the server once."""

    def __init__(self, connection: Cluster) -> None:
        self._connection = connection
        self._producer: AIOKafkaProducer | None = None
        self._starting = asyncio.Lock()
        self._turn = count()
        self._single: set[str] = set()
        """Topics whose limit is unknown and lower than a full batch. Each record is sent alone."""
        self._dropping: set[asyncio.Task[None]] = set()

    async def stop(self) -> None:
        """Close the producer. Records that are not written yet stay unwritten."""
        self._drop(self._producer)
        if self._dropping:
            await asyncio.wait(self._dropping)

    def _drop(self, producer: AIOKafkaProducer | None) -> None:
        """Give up this producer. The next call makes a new one. `stop` waits for the old one."""
        if producer is not None and self._producer is producer:
            self._producer = None
            self.retire(producer)

    def retire(self, producer: AIOKafkaProducer) -> None:
        """Close a producer in the background: without the server, it takes seconds."""
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
        """Append records and return their outcomes. They are durable when the call returns.

        Records of one partition keep their order, unless the server refuses some of them. Raises
        `Unavailable`; some records may be written.
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
            # An idempotent producer retries a batch for ever. If it were kept, each retry of this
            # call would add another batch.
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
        """Send records without an outcome, and note outcomes. Some may need another call."""
        batches = await self.pack(producer, records, written)
        futures: list[tuple[Future[Any], int, list[int]]] = []
        for (topic, partition), batch in batches:
            future = await producer.send_batch(batch.builder, topic, partition=partition)
            future.add_done_callback(seen)
            futures.append((future, partition, batch.members))
        if futures:
            await asyncio.wait([future for future, *_ in futures])
        for future, partition, members in futures:
            error = future.exception()
            if error is None:
                first, stamp = future.result().offset, future.result().timestamp
                for offset, at in enumerate(members, first):
                    written[at] = Written(None, stamp, partition, offset)
            else:
                # The server counts batches, and it has not counted this one. This producer's next
                # batches to that partition would be out of order.
                self._drop(producer)
                outcome = self._refusal(error, [records[at] for at in members])
                for at in members:
                    written[at] = outcome

    def _refusal(self, error: BaseException, records: Sequence[Record]) -> Written | None:
        """Return why records are refused, or None if they must be sent again."""
        name = type(error).__name__
        if name == "OutOfOrderSequenceNumber":
            return None
        if name in TOO_LARGE:
            self._connection.forget_topics()
            if len(records) == 1:
                return Written(oversized(records[0], None))
            # The limit is unknown or was lowered. Each record may fit alone.
            self._single.update(record.topic for record in records)
            return None
        if isinstance(translated := self._connection.translated(error), ConfigurationError):
            return Written(translated)
        raise error

    def refusal(self, record: Record) -> PayloadTooLarge | None:
        """Return why a record is larger than its topic takes, as far as that is known."""
        largest = self._connection.largest(record.topic)
        if largest is None or record.size <= largest:
            return None
        return oversized(record, largest)

    async def pack(
        self, producer: AIOKafkaProducer, records: Sequence[Record], written: list[Written | None]
    ) -> list[tuple[tuple[str, int], Batch]]:
        """Pack records by partition. The first batches come first, so that they share a request.

        Records larger than their topic's limit are left out, and noted in `written`.
        """
        sizes: dict[str, int] = {}
        packed: dict[tuple[str, int], list[Batch]] = {}
        turn = next(self._turn)
        too_large: set[str] = set()
        for at, record in enumerate(records):
            if written[at] is not None:
                continue
            largest, size = self._connection.largest(record.topic), record.size
            if (refusal := self.refusal(record)) is not None:
                written[at] = Written(refusal)
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
            # Somebody may raise the limit, so check it again.
            self._connection.forget_topics(*too_large)
        rounds = zip_longest(*([(place, b) for b in some] for place, some in packed.items()))
        return [batch for some in rounds for batch in some if batch is not None]


class Batch:
    """Records that are sent together, and their positions in the call."""

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


def oversized(record: Record, largest: int | None) -> PayloadTooLarge:
    """Return the error of a record that is larger than its topic takes; None: limit unknown."""
    limit = "" if largest is None else f" of {largest} bytes"
    return PayloadTooLarge(
        f"{record.size} bytes are more than the topic {record.topic} takes "
        f"(its max.message.bytes{limit})"
    )


def seen(future: Future[Any]) -> None:
    """Mark the error of a batch as retrieved, in case its writer was cancelled."""
    if not future.cancelled() and future.exception() is not None:
        logger.debug("a batch was not written: %r", future.exception())


async def _close(producer: AIOKafkaProducer) -> None:
    """Close a producer at once. Its own `stop` would wait until everything is written."""
    producer._closed = True
    sender: asyncio.Task[None] | None = producer._sender.sender_task
    while sender is not None and not sender.done():
        # It waits until pending answers arrive or time out. But a transaction would look for its
        # coordinator without end; being cancelled again, it gives up one thing that it waits for.
        sender.cancel()
        await asyncio.wait({sender}, timeout=CLOSING)
    if sender is not None and not sender.cancelled() and (error := sender.exception()) is not None:
        logger.debug("a producer had ended: %r", error)
    await producer.client.close()
