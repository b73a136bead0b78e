"""Shards: where tasks go, what a new shard moves, and one that is drained."""

from __future__ import annotations

import asyncio
from collections import Counter
from uuid import uuid4

import pytest

from qtasks import Task
from qtasks.asyncio import QueueTasks
from qtasks.compose import FailoverBroker, ShardedBroker
from qtasks_core import QueueDepth
from qtasks_core.errors import ConfigurationError
from qtasks_core.lookup import resolve_broker
from qtasks_memory import MemoryBroker
from tests.processes import PATIENCE
from tests.services import Service


def test_a_new_shard_takes_its_share_and_moves_no_other_task() -> None:
    brokers = {name: MemoryBroker(name) for name in ("a", "b", "c", "d")}
    three = ShardedBroker({name: brokers[name] for name in ("a", "b", "c")})
    four = ShardedBroker(brokers)
    uuids = [str(uuid4()) for _ in range(4000)]
    before = {uuid: three.shard_of(uuid) for uuid in uuids}
    after = {uuid: four.shard_of(uuid) for uuid in uuids}
    assert all(after[u] in (before[u], brokers["d"]) for u in uuids)
    for found, count in ((before, 3), (after, 4)):
        for number in Counter(map(id, found.values())).values():
            assert abs(number - 4000 / count) < 150  # five times the standard deviation


async def test_a_shard_is_added_and_another_drained_while_the_app_works(
    redis_server: Service, postgres_server: Service, rabbitmq_server: Service
) -> None:
    """Deployments that know different shards work beside each other, and nothing is lost."""
    name = f"shards-{uuid4().hex[:8]}"
    redis, postgres, rabbit = redis_server.url, postgres_server.url, rabbitmq_server.url
    deployments = [
        ShardedBroker({"redis": redis, "postgres": postgres}),
        ShardedBroker({"redis": redis, "postgres": postgres, "rabbit": rabbit}),
        ShardedBroker({"redis": redis, "postgres": postgres, "rabbit": rabbit}, draining=["redis"]),
    ]
    apps = [QueueTasks(name, broker, postgres) for broker in deployments]

    async def add(x: int, y: int) -> int:
        return x + y

    adds = [app.task(name="add")(add) for app in apps]
    async with apps[0], apps[1], apps[2]:
        tasks: list[Task[int]] = []
        for at in range(3):
            tasks += await adds[at].map([(number, at) for number in range(40)])
            tasks.append(await adds[at].add_task(100, at, delay=0.5))
        async with apps[1].worker(), apps[2].worker():
            results = [(await task.wait_result(PATIENCE)).returning for task in tasks]
    assert results == [n + at for at in range(3) for n in (*range(40), 100)]
    drained = resolve_broker(redis)
    await drained.start(name)
    assert await drained.depth("default") == QueueDepth(ready=0, delayed=0, in_flight=0)
    await drained.stop()


async def test_a_shard_may_be_made_of_brokers_too(
    redis_server: Service, postgres_server: Service, rabbitmq_server: Service
) -> None:
    name = f"shards-{uuid4().hex[:8]}"
    redis = FailoverBroker(redis_server.url, rabbitmq_server.url)
    broker = ShardedBroker({"one": redis, "two": postgres_server.url})
    app = QueueTasks(name, broker, postgres_server.url)

    @app.task(name="add", retry=1)
    async def add(x: int, y: int) -> int:
        return x + y

    async with app, app.worker():
        await asyncio.to_thread(redis_server.kill)
        try:
            tasks = await add.map([(number, 1) for number in range(20)])
            results = [(await task.wait_result(PATIENCE)).returning for task in tasks]
        finally:
            await asyncio.to_thread(redis_server.restart)
    assert results == list(range(1, 21))


def test_wrong_shards_are_named() -> None:
    with pytest.raises(ConfigurationError, match="the same broker"):
        ShardedBroker({"a": "memory://", "b": "memory://"})
    with pytest.raises(ConfigurationError, match=r"draining=\['c'\] names no shard"):
        ShardedBroker({"a": "memory://"}, draining=["c"])
    with pytest.raises(ConfigurationError, match="all are draining"):
        ShardedBroker({"a": "memory://"}, draining=["a"])
