"""aiormq alone, the layer below aio-pika: a quorum queue, a stream for results, bulk acks."""

from __future__ import annotations

import asyncio
from uuid import uuid4

import aiormq
from aiormq.abc import AbstractChannel, DeliveredMessage
from pamqp.commands import Basic

from benchmarks.bare import BATCH, MESSAGE, RECEIVE, RECORD
from benchmarks.bare.clock import Rate, round_trips

PERSISTENT = Basic.Properties(delivery_mode=2)


async def run(url: str, tasks: int) -> dict[str, float]:
    """Measure on new queues."""
    connection = await aiormq.connect(url)
    channel = await connection.channel(publisher_confirms=True)
    work, results = f"bare-work-{uuid4()}", f"bare-results-{uuid4()}"
    for queue, kind in ((work, "quorum"), (results, "stream")):
        await channel.queue_declare(queue, durable=True, arguments={"x-queue-type": kind})
    try:
        with Rate(tasks) as bulk:
            for _ in range(0, tasks, BATCH):
                await send(channel, [(work, MESSAGE), (results, RECORD)], BATCH)
        worker = Worker(await connection.channel(publisher_confirms=True), results)
        with Rate(tasks) as processed:
            await worker.start(work)
            await worker.until(tasks)
        trips = await round_trip(await connection.channel(), channel, work, results)
        await worker.stop()
    finally:
        for queue in (work, results):
            await channel.queue_delete(queue)
        await connection.close()
    return {"bulk": bulk.value, "process": processed.value, **trips}


async def send(channel: AbstractChannel, what: list[tuple[str, bytes]], count: int) -> None:
    await asyncio.gather(
        *(
            channel.basic_publish(body, routing_key=queue, properties=PERSISTENT)
            for _ in range(count)
            for queue, body in what
        )
    )


def tag_of(message: DeliveredMessage) -> int:
    assert isinstance(message.delivery, Basic.Deliver)
    tag = message.delivery.delivery_tag
    assert tag is not None
    return tag


class Worker:
    """Consumes messages, publishes results, and acknowledges each batch in one call."""

    def __init__(self, channel: AbstractChannel, results: str) -> None:
        self._channel = channel
        self._results = results
        self._arrived: asyncio.Queue[DeliveredMessage] = asyncio.Queue()
        self._done = 0
        self._changed = asyncio.Event()

    async def start(self, queue: str) -> None:
        await self._channel.basic_qos(prefetch_count=RECEIVE * 2)
        await self._channel.basic_consume(queue, self._arrived.put)
        self._task = asyncio.create_task(self._work())

    async def _work(self) -> None:
        while True:
            batch = [await self._arrived.get()]
            while not self._arrived.empty() and len(batch) < RECEIVE:
                batch.append(self._arrived.get_nowait())
            await send(self._channel, [(self._results, RECORD)], len(batch))
            await self._channel.basic_ack(tag_of(batch[-1]), multiple=True)
            self._done += len(batch)
            self._changed.set()

    async def until(self, count: int) -> None:
        while self._done < count:
            self._changed.clear()
            await self._changed.wait()

    async def stop(self) -> None:
        self._task.cancel()
        await asyncio.wait({self._task})


async def round_trip(
    inbox: AbstractChannel, channel: AbstractChannel, work: str, results: str
) -> dict[str, float]:
    answers: asyncio.Queue[DeliveredMessage] = asyncio.Queue()
    await inbox.basic_qos(prefetch_count=1000)
    await inbox.basic_consume(results, answers.put, arguments={"x-stream-offset": "next"})

    async def once() -> None:
        await send(channel, [(work, MESSAGE)], 1)
        await inbox.basic_ack(tag_of(await answers.get()))

    return await round_trips(once)
