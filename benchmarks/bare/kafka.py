"""aiokafka alone: an idempotent producer, one consumer, results in a topic, commits in batches.

A record can be found in a log only by reading the log. So admitting asks for the end of the log and
reads up to it, and a result counts when it was read back. `LogStorage` does the same.
"""

from __future__ import annotations

import asyncio
from uuid import uuid4

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from benchmarks.bare import BATCH, MESSAGE, RECEIVE, RECORD
from benchmarks.bare.clock import Rate, round_trips

PARTITIONS = 4


async def run(url: str, tasks: int) -> dict[str, float]:
    """Measure on new topics."""
    servers = url.partition("://")[2].partition("?")[0]
    work, results = f"bare-work-{uuid4()}", f"bare-results-{uuid4()}"
    admin = AIOKafkaAdminClient(bootstrap_servers=servers)
    await admin.start()
    await admin.create_topics([NewTopic(t, PARTITIONS, 1) for t in (work, results)])
    await admin.close()
    producer = AIOKafkaProducer(bootstrap_servers=servers, acks="all", enable_idempotence=True)
    consumer = AIOKafkaConsumer(
        work, bootstrap_servers=servers, group_id=work, enable_auto_commit=False,
        auto_offset_reset="earliest",
    )  # fmt: skip
    log = Log(results, servers)
    for client in (producer, consumer, log.reader, log.asker):
        await client.start()
    log.begin()
    try:
        with Rate(tasks) as bulk:
            for _ in range(0, tasks, BATCH):
                await send(producer, [(work, MESSAGE), (results, RECORD)], BATCH)
        await log.catch_up()
        left = tasks
        with Rate(tasks) as processed:
            while left > 0:
                left -= await process(consumer, producer, log)
        trips = await round_trip(consumer, producer, log, work)
    finally:
        for client in (log.asker, log.reader, consumer, producer):
            await client.stop()
    return {"bulk": bulk.value, "process": processed.value, **trips}


class Log:
    """The topic of results. It is read from the start; another connection asks for its end."""

    def __init__(self, topic: str, servers: str) -> None:
        self.topic = topic
        self.reader = AIOKafkaConsumer(bootstrap_servers=servers)
        self.asker = AIOKafkaConsumer(bootstrap_servers=servers)
        self._partitions = [TopicPartition(topic, p) for p in range(PARTITIONS)]
        self._read = dict.fromkeys(self._partitions, 0)

    def begin(self) -> None:
        self.reader.assign(self._partitions)
        for partition in self._partitions:
            self.reader.seek(partition, 0)

    async def catch_up(self) -> None:
        ends = await self.asker.end_offsets(self._partitions)
        while any(self._read[partition] < end for partition, end in ends.items()):
            for partition, records in (await self.reader.getmany(timeout_ms=1000)).items():
                self._read[partition] = records[-1].offset + 1


async def send(producer: AIOKafkaProducer, what: list[tuple[str, bytes]], count: int) -> None:
    sent = [await producer.send(topic, value) for _ in range(count) for topic, value in what]
    await asyncio.gather(*sent)


async def process(consumer: AIOKafkaConsumer, producer: AIOKafkaProducer, log: Log) -> int:
    batches = await consumer.getmany(timeout_ms=1000, max_records=RECEIVE)
    count = sum(len(records) for records in batches.values())
    if count:
        await log.catch_up()
        await send(producer, [(log.topic, RECORD)], count)
        await log.catch_up()
        await consumer.commit()
    return count


async def round_trip(
    consumer: AIOKafkaConsumer, producer: AIOKafkaProducer, log: Log, work: str
) -> dict[str, float]:
    answered = asyncio.Event()

    async def worker() -> None:
        while True:
            if await process(consumer, producer, log):
                answered.set()

    async def once() -> None:
        answered.clear()
        await send(producer, [(work, MESSAGE)], 1)
        await answered.wait()

    working = asyncio.create_task(worker())
    try:
        return await round_trips(once)
    finally:
        working.cancel()
        await asyncio.wait({working})
