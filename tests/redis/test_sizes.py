"""What is larger than the server takes is refused by itself."""

from __future__ import annotations

from collections.abc import AsyncIterator
from uuid import uuid4

import pytest
from redis.asyncio import Redis

from qtasks_core import DONE, Ack, Retry, Task, TaskMessage
from qtasks_redis import RedisBroker, RedisStorage
from tests.services import Service

LIMIT = 2**20  # the least that Redis lets one set


@pytest.fixture
async def limited(redis_server: Service) -> AsyncIterator[None]:
    server: Redis = Redis.from_url(redis_server.url)
    before = (await server.config_get("proto-max-bulk-len"))["proto-max-bulk-len"] or 2**29
    await server.config_set("proto-max-bulk-len", LIMIT)
    try:
        yield
    finally:
        await server.config_set("proto-max-bulk-len", before)
        await server.aclose()


def record(uuid: str, size: int) -> Task:
    return Task(uuid=uuid, task_name="n", status="success", returning=b"x" * size)


async def test_one_record_over_the_limit_holds_up_no_other(
    redis_server: Service, limited: None
) -> None:
    storage = RedisStorage(redis_server.url)
    await storage.start(uuid4().hex)
    try:
        assert storage.guarantees.largest == LIMIT - 1024
        tasks = [record("a", 10), record("big", LIMIT), record("fits", LIMIT - 2048)]
        outcomes = await storage.save(tasks)
        assert [outcome.status for outcome in outcomes] == ["done", "refused", "done"]
        assert outcomes[1].current is None
        found = await storage.get(["a", "big", "fits"])
        assert [task is not None for task in found] == [True, False, True]
    finally:
        await storage.stop()


async def test_one_message_over_the_limit_holds_up_no_other(
    redis_server: Service, limited: None
) -> None:
    broker = RedisBroker(redis_server.url)
    await broker.start(uuid4().hex)
    try:
        small = TaskMessage(uuid="u", task_name="n", queue="q")
        big = TaskMessage(uuid="big", task_name="n", queue="q", args=b"x" * LIMIT)
        outcomes = await broker.publish([small, big, small])
        assert [outcome.status for outcome in outcomes] == ["done", "refused", "done"]
        subscription = await broker.subscribe({"q": 9})
        deliveries = await subscription.receive({"q": 9}, 9)
        outcomes = await subscription.settle([Retry(deliveries[0], big), Ack(deliveries[1])])
        assert [outcome.status for outcome in outcomes] == ["refused", "done"]
        # It is ours still, and can be settled otherwise.
        assert await subscription.settle([Ack(deliveries[0])]) == [DONE]
    finally:
        await broker.stop()
