"""A limit on the connections: calls and blocking reads share what there is."""

from __future__ import annotations

import asyncio
from uuid import uuid4

import pytest
from redis.asyncio import Redis

from qtasks_core import DONE, TaskMessage
from qtasks_core.errors import Unavailable
from qtasks_redis import RedisBroker, RedisStorage
from tests.services import Service


def message(queue: str) -> TaskMessage:
    return TaskMessage(uuid=str(uuid4()), task_name="tests:task", queue=queue)


async def waits(server: Redis, name: str, most: int) -> None:
    """Wait until all of them but one are in a blocking read."""
    while True:
        clients = [one for one in await server.client_list() if one["name"] == name]
        assert len(clients) <= most
        if sum("b" in one["flags"] for one in clients) == most - 1:
            return
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("most", [2, 4])
async def test_receivers_wait_and_many_publish_at_once(redis_server: Service, most: int) -> None:
    name = f"limit-{uuid4()}"
    broker = RedisBroker(f"{redis_server.url}?max_connections={most}&client_name={name}")
    await broker.start(str(uuid4()))
    queues = [f"q{at}" for at in range(most - 1)]
    subscriptions = [await broker.subscribe({queue: 1}) for queue in queues]
    receiving = [
        asyncio.create_task(subscription.receive({queue: 1}, 1))
        for subscription, queue in zip(subscriptions, queues, strict=True)
    ]
    async with asyncio.timeout(120), Redis.from_url(redis_server.url) as server:
        await waits(server, name, most)
        outcomes = await asyncio.gather(
            *(broker.publish([message(queue)]) for queue in queues * 10)
        )
        assert outcomes == [[DONE]] * len(queues) * 10
        assert [len(await one) for one in receiving] == [1] * len(queues)
    await broker.stop()


async def test_too_many_receivers_are_told_how_many_it_takes(redis_server: Service) -> None:
    name = f"limit-{uuid4()}"
    broker = RedisBroker(f"{redis_server.url}?max_connections=2&client_name={name}")
    await broker.start(str(uuid4()))
    one, other = await broker.subscribe({"a": 1}), await broker.subscribe({"b": 1})
    receiving = asyncio.create_task(one.receive({"a": 1}, 1))
    async with asyncio.timeout(120), Redis.from_url(redis_server.url) as server:
        await waits(server, name, 2)
        with pytest.raises(Unavailable, match=r"max_connections=2.*must be at least 3"):
            await other.receive({"b": 1}, 1)
        await broker.publish([message("a"), message("b")])
        assert len(await receiving) == 1
        assert len(await other.receive({"b": 1}, 1)) == 1
    await broker.stop()


async def test_a_storage_works_with_one(redis_server: Service) -> None:
    storage = RedisStorage(f"{redis_server.url}?max_connections=1")
    await storage.start(str(uuid4()))
    found = await asyncio.gather(*(storage.get([str(uuid4())]) for _ in range(20)))
    assert found == [[None]] * 20
    await storage.stop()
