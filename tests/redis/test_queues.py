"""Priorities, counting and dropping: what the levels of a queue do."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from uuid import uuid4

import msgspec
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
async def patient(redis_server: Service) -> AsyncIterator[RedisBroker]:
    """Its leases hold on a slow machine."""
    broker = RedisBroker(redis_server.url, lease=300.0)
    await broker.start(f"queues-{uuid4().hex[:8]}")
    yield broker
    await broker.stop()


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


async def test_a_delayed_message_keeps_its_priority(broker: RedisBroker) -> None:
    """Whatever its arguments are."""
    args = msgspec.msgpack.encode({"priority": 1})
    sent = [message(at, delay=0.1, args=args) for at in (0, 9, 5, 7)]
    await broker.publish(sent)
    subscription = await broker.subscribe({"default": 9})
    taken: list[Delivery] = []
    while len(taken) < 4:
        taken += await subscription.receive({"default": 9}, 9)
    assert [d.fence.priority for d in taken] == priorities(taken)
    assert sorted(priorities(taken)) == [0, 5, 7, 9]


async def test_a_queue_that_was_emptied_is_not_asked_again(
    patient: RedisBroker, server: Redis
) -> None:
    """Its bell tells of the next message."""

    async def asked() -> int:
        stats = await server.info("commandstats")
        return sum(stats.get(f"cmdstat_{name}", {}).get("calls", 0) for name in ("eval", "evalsha"))

    subscription = await patient.subscribe({"default": 9, "other": 9})
    await patient.publish([message(), message()])
    assert len(await subscription.receive({"default": 9, "other": 9}, 9)) == 2
    # A receiver that slept would have taken the token that woke it.
    await server.delete(patient.started().key("bell", "default"))
    before = await asked()
    receiving = asyncio.create_task(subscription.receive({"default": 7}, 7))
    done, _ = await asyncio.wait({receiving}, timeout=0.1)
    assert not done
    assert await asked() == before
    await patient.publish([last := message()])
    assert [delivery.message for delivery in await receiving] == [last]


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


async def test_purge_takes_all_levels_and_much(patient: RedisBroker, server: Redis) -> None:
    subscription = await patient.subscribe({"default": 10})
    await patient.publish([message(9)])
    (held,) = await subscription.receive({"default": 1}, 1)
    await patient.publish([message(at % 10) for at in range(3000)])
    await patient.publish([message(at % 10, delay=60.0) for at in range(1200)])
    assert await subscription.extend([held]) == [held]
    assert await patient.purge("default") == 4200
    depth = await patient.depth("default")
    assert depth == QueueDepth(0, 0, 1, None)
    assert await subscription.settle([Ack(held)]) == [DONE]
    key = patient.started().key
    assert await server.xlen(key("stream", "default")) == 0
    later = message(4)
    await patient.publish([later])
    (delivery,) = await subscription.receive({"default": 1}, 1)
    assert delivery.message == later
