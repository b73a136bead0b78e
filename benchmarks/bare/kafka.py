"""aiokafka alone: an idempotent producer, one consumer, results in a topic, commits in batches."""

from __future__ import annotations

import asyncio
from uuid import uuid4

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from benchmarks.bare import BATCH, MESSAGE, RECEIVE, RECORD
from benchmarks.bare.clock import Rate, round_trips

PARTITIONS = 4


async def run(url: str, tasks: int) -> dict[str, float]:
    """Measure on topics of its own."""
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
    inbox = AIOKafkaConsumer(results, bootstrap_servers=servers, auto_offset_reset="latest")
    for client in (producer, consumer, inbox):
        await client.start()
    try:
        with Rate(tasks) as bulk:
            for _ in range(0, tasks, BATCH):
                await send(producer, [(work, MESSAGE), (results, RECORD)], BATCH)
        left = tasks
        await consumer.getmany(timeout_ms=10_000, max_records=1)
        await consumer.seek_to_beginning()
        with Rate(tasks) as processed:
            while left > 0:
                left -= await process(consumer, producer, results)
        trips = await round_trip(consumer, producer, inbox, work, results)
    finally:
        for client in (inbox, consumer, producer):
            await client.stop()
    return {"bulk": bulk.value, "process": processed.value, **trips}


async def send(producer: AIOKafkaProducer, what: list[tuple[str, bytes]], count: int) -> None:
    sent = [await producer.send(topic, value) for _ in range(count) for topic, value in what]
    await asyncio.gather(*sent)


async def process(consumer: AIOKafkaConsumer, producer: AIOKafkaProducer, results: str) -> int:
    batches = await consumer.getmany(timeout_ms=1000, max_records=RECEIVE)
    count = sum(len(records) for records in batches.values())
    if count:
        await send(producer, [(results, RECORD)], count)
        await consumer.commit()
    return count


async def round_trip(
    consumer: AIOKafkaConsumer,
    producer: AIOKafkaProducer,
    inbox: AIOKafkaConsumer,
    work: str,
    results: str,
) -> dict[str, float]:
    async def worker() -> None:
        while True:
            await process(consumer, producer, results)

    async def once() -> None:
        await send(producer, [(work, MESSAGE)], 1)
        await inbox.getone()

    while await inbox.getmany(timeout_ms=500):
        pass
    working = asyncio.create_task(worker())
    try:
        return await round_trips(once)
    finally:
        working.cancel()
        await asyncio.wait({working})
