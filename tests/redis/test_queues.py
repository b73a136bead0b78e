"""Priorities, counting and dropping: what the levels of a queue do."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from uuid import uuid4

import pytest
from redis.asyncio import Redis

from qtasks_core import DONE, Ack, Delivery, QueueDepth, Release, Retry, Settlement, TaskMessage
from qtasks_redis import RedisBroker
from tests.services import Service


def message(priority: int = 5, **fields: object) -> TaskMessage:
    return TaskMessage(uuid=str(uuid4()), task_name="a", priority=priority, **fields)  # type: ignore[arg-type]


def priorities(deliveries: list[Delivery]) -> list[int]:
    return [d.message.priority for d in deliveries if isinstance(d.message, TaskMessage)]


@pytest.fixture
async def broker(redis_server: Service) -> AsyncIterator[RedisBroker]:
    broker = RedisBroker(redis_server.url, lease=0.5)
    await broker.start(f"queues-{uuid4().hex[:8]}")
    yield broker
    await broker.stop()


@pytest.fixture
async def server(redis_server: Service) -> AsyncIterator[Redis]:
    client: Redis = Redis.from_url(redis_server.url)
    yield client
    await client.aclose()


async def test_nine_goes_first_also_after_a_delay_a_retry_and_a_release(
    broker: RedisBroker,
) -> None:
    subscription = await broker.subscribe({"default": 10})
    await broker.publish([message(5), message(0), message(9, delay=0.1), message(7)])
    await asyncio.sleep(0.3)
    taken = await subscription.receive({"default": 4}, 4)
    assert priorities(taken) == [9, 7, 5, 0]
    retry = Retry(taken[2], message(8))
    settled: list[Settlement] = [Release(taken[0]), Ack(taken[1]), retry, Release(taken[3])]
    assert await subscription.settle(settled) == [DONE] * 4
    again = await subscription.receive({"default": 4}, 4)
    assert priorities(again) == [9, 8, 0]
    assert [delivery.count for delivery in again] == [2, 1, 2]
    assert await subscription.extend(again) == again
    await asyncio.sleep(0.7)
    lost = await subscription.receive({"default": 4}, 4)
    assert priorities(lost) == [9, 8, 0]
    assert await subscription.settle([Ack(delivery) for delivery in lost]) == [DONE] * 3


async def test_a_level_without_messages_costs_nothing(broker: RedisBroker, server: Redis) -> None:
    key = broker.started().key
    subscription = await broker.subscribe({"default": 10})
    await broker.publish([message(9), message(1)])
    assert await server.smembers(key("levels", "default")) == {b"9", b"1"}
    taken = await subscription.receive({"default": 3}, 3)
    assert await subscription.settle([Ack(delivery) for delivery in taken]) == [DONE] * 2
    await broker.publish([message()])
    await subscription.receive({"default": 3}, 3)
    assert not await server.exists(key("levels", "default"))


async def test_a_priority_that_cannot_be_read_is_the_usual_one(broker: RedisBroker) -> None:
    """Another program may have written it. It still comes, and says what is wrong with it."""
    connection = broker.started()
    for text in (b"priority", b"\x01\x81\xa8priority\xa1x", b"\x01\x81\xa8priority\x0c"):
        await connection.call("ZADD", connection.key("delayed", "default"), 1, text)
    await broker.publish([message(6)])
    taken = await (await broker.subscribe({"default": 9})).receive({"default": 9}, 9)
    assert [delivery.fence.priority for delivery in taken] == [6, 5, 5, 5]


async def test_a_backlog_does_not_keep_the_next_queue_waiting(broker: RedisBroker) -> None:
    """What one queue may take at once is a number of its own, whatever its priorities."""
    await broker.publish([message(9, queue="a") for _ in range(50)])
    await broker.publish([message(0, queue="b") for _ in range(3)])
    subscription = await broker.subscribe({"a": 5, "b": 5})
    taken = await subscription.receive({"a": 5, "b": 5}, 8)
    assert [delivery.queue for delivery in taken] == ["a"] * 5 + ["b"] * 3


async def test_the_depth_has_all_levels_and_an_age(broker: RedisBroker) -> None:
    assert await broker.depth("default") == QueueDepth(0, 0, 0, None)
    subscription = await broker.subscribe({"default": 10})
    await broker.publish([message(9), message(5)])
    taken = await subscription.receive({"default": 2}, 2)
    await broker.publish([message(8), message(), message(3, delay=60.0)])
    depth = await broker.depth("default")
    assert (depth.ready, depth.delayed, depth.in_flight) == (2, 1, 2)
    await asyncio.sleep(0.3)
    age = (await broker.depth("default")).oldest_age
    assert age is not None
    assert 0.3 <= age < 5
    await subscription.settle([Ack(taken[0])])
    await asyncio.sleep(0.4)  # the lease of the other one runs out
    depth = await broker.depth("default")
    assert (depth.ready, depth.delayed, depth.in_flight) == (3, 1, 0)
    older = depth.oldest_age
    assert older is not None
    assert older >= 0.7, "it is as old as when it came"


async def test_a_due_message_is_ready_since_it_is_due(broker: RedisBroker) -> None:
    await broker.publish([message(delay=0.2)])
    await asyncio.sleep(0.5)
    depth = await broker.depth("default")
    assert (depth.ready, depth.delayed) == (1, 0)
    assert depth.oldest_age is not None
    assert 0.2 <= depth.oldest_age < 5


async def test_purge_takes_all_levels_and_much(redis_server: Service, server: Redis) -> None:
    broker = RedisBroker(redis_server.url)
    await broker.start(f"queues-{uuid4().hex[:8]}")
    subscription = await broker.subscribe({"default": 10})
    await broker.publish([message(9)])
    (held,) = await subscription.receive({"default": 1}, 1)
    await broker.publish([message(at % 10) for at in range(3000)])
    await broker.publish([message(at % 10, delay=60.0) for at in range(1200)])
    assert await subscription.extend([held]) == [held]
    assert await broker.purge("default") == 4200
    depth = await broker.depth("default")
    assert depth == QueueDepth(0, 0, 1, None)
    assert await subscription.settle([Ack(held)]) == [DONE]
    key = broker.started().key
    assert await server.xlen(key("stream", "default")) == 0
    later = message(4)
    await broker.publish([later])
    (delivery,) = await subscription.receive({"default": 1}, 1)
    assert delivery.message == later
    await broker.stop()
