"""Transactions: one producer with a transactional id, and how its predecessors are fenced."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from aiokafka.errors import IllegalOperation, ProducerFenced

from qtasks_core.errors import ConfigurationError, QTasksError
from qtasks_kafka.connection import Connection
from qtasks_kafka.settings import REQUEST
from qtasks_kafka.writer import TOO_LARGE, Record, Written, oversized, seen

if TYPE_CHECKING:
    from aiokafka import AIOKafkaProducer
    from aiokafka.structs import OffsetAndMetadata, TopicPartition


class RecordRefused(Exception):
    """The server refuses a record of a transaction, so nothing of that is written.

    `reason` is `PayloadTooLarge` or `ConfigurationError`. Which record of `topic` it is, is not
    known if the transaction has several.
    """

    def __init__(self, topic: str, reason: QTasksError) -> None:
        super().__init__(str(reason))
        self.topic = topic
        self.reason = reason


class Transactor:
    """A producer that writes one transaction after the other. It is of no use after an error.

    Whether the transaction of a call that raised was committed is known once its id was fenced.
    """

    def __init__(self, connection: Connection, transactional_id: str) -> None:
        self.id = transactional_id
        self._connection = connection
        self._producer: AIOKafkaProducer = connection.producer(transactional_id)

    async def start(self) -> None:
        """Take over the id. An open transaction of an earlier producer is aborted."""
        try:
            await self._producer.start()
        except BaseException:
            self.close()
            raise

    async def commit(
        self,
        records: Sequence[Record],
        offsets: Mapping[TopicPartition, OffsetAndMetadata] | None = None,
        group: str = "",
    ) -> None:
        """Append records and commit offsets, all or nothing. Durable when the call returns.

        What it wrote can be read a little later, when the server has marked each partition. Raises
        `RecordRefused` and `KafkaError`.
        """
        try:
            await self._commit(records, offsets or {}, group)
        except (IllegalOperation, AssertionError) as error:
            # So the driver says that the transaction has failed since the call before.
            raise ProducerFenced from error

    async def _commit(
        self,
        records: Sequence[Record],
        offsets: Mapping[TopicPartition, OffsetAndMetadata],
        group: str,
    ) -> None:
        producer = self._producer
        await producer.begin_transaction()
        futures = []
        writer = self._connection.running_writer()
        refused: list[Written | None] = [None] * len(records)
        packed = await writer.pack(producer, records, refused)
        for record, written in zip(records, refused, strict=True):
            if written is not None and written.refused is not None:
                raise RecordRefused(record.topic, written.refused)
        for (topic, partition), batch in packed:
            future = await producer.send_batch(batch.builder, topic, partition=partition)
            future.add_done_callback(seen)
            futures.append((future, topic, [records[at] for at in batch.members]))
        if offsets:
            await producer.send_offsets_to_transaction(dict(offsets), group)
        if futures:
            await asyncio.wait([future for future, *_ in futures])
        for future, topic, members in futures:
            if (error := future.exception()) is not None:
                self._check_refusal(error, topic, members)
                raise error
        await producer.commit_transaction()

    def _check_refusal(self, error: BaseException, topic: str, records: Sequence[Record]) -> None:
        if type(error).__name__ in TOO_LARGE:
            self._connection.forget_topics(topic)
            raise RecordRefused(topic, oversized(records[0], None)) from error
        if isinstance(translated := self._connection.translated(error), ConfigurationError):
            raise RecordRefused(topic, translated) from error

    def close(self) -> None:
        """Close the producer. An open transaction stays, until its id is fenced."""
        self._connection.running_writer().retire(self._producer)


async def fence(connection: Connection, transactional_id: str) -> None:
    """End what the producers of an id do: from here on, none of them can commit anything.

    The server aborts an open transaction. If it is being committed already, that is over when this
    returns, so the committed offsets that are read next are the last ones. A producer that starts
    with the id later is not fenced: nobody may use an id again.
    """
    successor = Transactor(connection, transactional_id)
    await successor.start()
    successor.close()


class Submitter:
    """Writes the transactions of a client: they have no offsets, so nobody has to fence them."""

    def __init__(self, connection: Connection, transactional_id: str) -> None:
        self._connection = connection
        self._id = transactional_id
        self._transactor: Transactor | None = None
        self._turn = asyncio.Lock()

    async def commit(self, records: Sequence[Record]) -> None:
        """Append records, all or none. Raises `Unavailable` and `RecordRefused`.

        After `Unavailable`, they may be written. If the transaction is still open, the next call
        aborts it, or the server does after `TRANSACTION_MS`.
        """
        with self._connection.reaching():
            async with asyncio.timeout(REQUEST), self._turn:
                transactor = self._transactor or await self._begin()
                try:
                    await transactor.commit(records)
                except BaseException as error:
                    self._connection.forget_topics()
                    self._transactor = None
                    transactor.close()
                    if isinstance(error, RecordRefused):
                        await self._begin()  # aborts it: nobody should wait for its end
                    raise

    async def _begin(self) -> Transactor:
        transactor = Transactor(self._connection, self._id)
        await transactor.start()
        self._transactor = transactor
        return transactor

    def stop(self) -> None:
        """Close the producer. The connection waits for that. Idempotent."""
        transactor, self._transactor = self._transactor, None
        if transactor is not None:
            transactor.close()
