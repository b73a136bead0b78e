"""redis-py alone: a stream with a consumer group, one key per record, pipelines."""

from __future__ import annotations

import asyncio
from typing import Any
from uuid import uuid4

from redis.asyncio import Redis

from benchmarks.bare import BATCH, MESSAGE, RECEIVE, RECORD
from benchmarks.bare.clock import Rate, round_trips


async def run(url: str, tasks: int) -> dict[str, float]:
    """Measure on new keys in the database of `url`."""
    redis: Any = Redis.from_url(url)
    stream = f"bare:{uuid4()}"
    await redis.xgroup_create(stream, "group", mkstream=True)
    with Rate(tasks) as bulk:
        for _ in range(0, tasks, BATCH):
            await enqueue(redis, stream, BATCH)
    with Rate(tasks) as processed:
        while await process(redis, stream, None):
            pass
    trips = await round_trip(redis, stream)
    await redis.aclose()
    return {"bulk": bulk.value, "process": processed.value, **trips}


async def enqueue(redis: Any, stream: str, count: int) -> None:
    pipeline = redis.pipeline(transaction=False)
    for _ in range(count):
        uuid = str(uuid4())
        pipeline.xadd(stream, {"u": uuid, "d": MESSAGE})
        pipeline.set(f"{stream}:{uuid}", RECORD)
    await pipeline.execute()


async def process(redis: Any, stream: str, block: int | None) -> int:
    answer = await redis.xreadgroup("group", "me", {stream: ">"}, count=RECEIVE, block=block)
    if not answer:
        return 0
    entries = answer[0][1]
    keys = [f"{stream}:{fields[b'u'].decode()}" for _, fields in entries]
    await redis.mget(keys)
    pipeline = redis.pipeline(transaction=False)
    for key in keys:
        pipeline.set(key, RECORD)
        pipeline.publish("bare-inbox", key)
    ids = [entry for entry, _ in entries]
    pipeline.xack(stream, "group", *ids)
    pipeline.xdel(stream, *ids)
    await pipeline.execute()
    return len(entries)


async def round_trip(redis: Any, stream: str) -> dict[str, float]:
    inbox = redis.pubsub(ignore_subscribe_messages=True)
    await inbox.subscribe("bare-inbox")

    async def work() -> None:
        while True:
            await process(redis, stream, 1000)

    async def once() -> None:
        await enqueue(redis, stream, 1)
        while await inbox.get_message(timeout=5) is None:
            pass

    worker = asyncio.create_task(work())
    try:
        return await round_trips(once)
    finally:
        worker.cancel()
        await asyncio.wait({worker})
        await inbox.aclose()
