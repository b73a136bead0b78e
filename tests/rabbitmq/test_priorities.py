"""Priorities: lanes that exist as far as they are used, or the server's own from 4.3 on."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import aiormq
import pytest

from qtasks_core import Ack, Delivery, QueueDepth, Release, Retry, Subscription, TaskMessage
from qtasks_rabbitmq import RabbitMQBroker, subscription
from qtasks_rabbitmq.broker import _address
from qtasks_rabbitmq.parcel import parcel_of
from qtasks_rabbitmq.topology import PRIORITIES, USUAL, Names
from tests.rabbitmq.operator import operator
from tests.rabbitmq.test_broker import collect, message, uuids
from tests.rabbitmq.test_control import hearing, say
from tests.services import Service

NEVER = 3600.0


async def one_by_one(receiver: Subscription, count: int) -> list[tuple[int, str]]:
    """Receive and acknowledge messages one at a time; return priorities and uuids."""
    received: list[tuple[int, str]] = []
    for _ in range(count):
        (delivery,) = await collect(receiver, "q", 1)
        received.append(known(delivery))
        await receiver.settle([Ack(delivery)])
    return received


def known(delivery: Delivery) -> tuple[int, str]:
    assert isinstance(delivery.message, TaskMessage)
    return delivery.message.priority, delivery.message.uuid


async def lanes_of(url: str, namespace: str, queue: str) -> list[int]:
    """Return the priorities whose lanes exist."""
    found: list[int] = []
    async with operator(url) as channel:
        for priority in PRIORITIES:
            other = await channel.connection.channel()
            with suppress(aiormq.exceptions.ChannelNotFoundEntity):
                await other.queue_declare(Names(namespace).queue(queue, priority), passive=True)
                found.append(priority)
    return found


async def test_ten_priorities_are_kept_and_each_is_first_in_first_out(
    broker: RabbitMQBroker,
) -> None:
    messages = [message(priority=priority) for _ in range(3) for priority in (5, 0, 9, 3, 7, 1)]
    messages += [message(priority=priority) for priority in (8, 2, 6, 4)]
    await broker.publish(messages)
    receiver = await broker.subscribe({"q": 1})
    expected = sorted(messages, key=lambda each: -each.priority)  # stable
    received = await one_by_one(receiver, len(messages))
    assert received == [(each.priority, each.uuid) for each in expected]


async def test_a_higher_message_overtakes_a_backlog(broker: RabbitMQBroker) -> None:
    """Also one that comes while the backlog is being received, in batches."""
    await broker.publish([message(priority=3) for _ in range(60)])
    receiver = await broker.subscribe({"q": 10})
    for priority in (9, 4, 8):
        high = message(priority=priority)
        await broker.publish([high])
        deliveries = await receiver.receive({"q": 10}, 10)
        assert known(deliveries[0]) == (priority, high.uuid)
        await receiver.settle([Ack(delivery) for delivery in deliveries])


async def test_the_usual_priority_creates_no_lane(
    broker: RabbitMQBroker, rabbitmq_server: Service, namespace: str
) -> None:
    await broker.publish([message("q"), message("other")])
    assert await lanes_of(rabbitmq_server.url, namespace, "q") == [USUAL]
    await broker.publish([message("q", priority=9)])
    assert await lanes_of(rabbitmq_server.url, namespace, "q") == [9, USUAL]
    assert await lanes_of(rabbitmq_server.url, namespace, "other") == [USUAL]


async def receive_new_lane(receiving: RabbitMQBroker, sending: RabbitMQBroker) -> None:
    receiver = await receiving.subscribe({"q": 5})
    waiting = asyncio.create_task(collect(receiver, "q", 2))
    await sending.publish([message()])
    await sending.publish([message(priority=9)])
    assert {known(delivery)[0] for delivery in await waiting} == {5, 9}


async def test_a_receiver_hears_of_new_lanes_from_its_own_broker(
    broker: RabbitMQBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subscription, "LOOK", NEVER)
    await receive_new_lane(broker, broker)


async def test_a_receiver_hears_of_new_lanes_among_the_commands(
    broker: RabbitMQBroker,
    rabbitmq_server: Service,
    namespace: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As a worker's does: it listens for commands."""
    monkeypatch.setattr(subscription, "LOOK", NEVER)
    other = RabbitMQBroker(rabbitmq_server.url)
    await other.start(namespace)
    try:
        async with hearing(broker) as heard:
            await say(broker, heard)
            await receive_new_lane(broker, other)
    finally:
        await other.stop()
    assert "passed over" not in caplog.text


async def test_a_receiver_that_hears_nothing_looks_for_new_lanes(
    broker: RabbitMQBroker,
    rabbitmq_server: Service,
    namespace: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(subscription, "LOOK", 0.3)
    other = RabbitMQBroker(rabbitmq_server.url)
    await other.start(namespace)
    try:
        await receive_new_lane(broker, other)
    finally:
        await other.stop()


async def test_a_priority_survives_retries_releases_and_delays(
    broker: RabbitMQBroker, rabbitmq_server: Service, namespace: str
) -> None:
    receiver = await broker.subscribe({"q": 5})
    await broker.publish([message(priority=8, delay=0.1)])
    (delayed,) = await collect(receiver, "q", 1)
    await receiver.settle([Release(delayed)])
    (released,) = await collect(receiver, "q", 1)
    assert released.count == 2
    again = message(priority=8, attempt=2, delay=0.1)
    await receiver.settle([Retry(released, again)])
    (retried,) = await collect(receiver, "q", 1)
    assert known(retried) == (8, again.uuid)
    await receiver.settle([Ack(retried)])
    assert await lanes_of(rabbitmq_server.url, namespace, "q") == [8, USUAL]


async def test_what_nobody_takes_goes_to_others_in_its_lane(broker: RabbitMQBroker) -> None:
    """One that receives one of three low messages leaves a high one, and the rest, to others."""
    holder, other = [await broker.subscribe({"q": 5}) for _ in range(2)]
    await broker.publish([message(priority=2) for _ in range(3)])
    held = await holder.receive({"q": 3}, 1)
    high = message(priority=9)
    await broker.publish([high])
    taken = await collect(other, "q", 3)
    assert [delivery.count for delivery in taken] == [1, 1, 1]
    assert high.uuid in uuids(taken)
    assert await holder.extend(held) == held


async def test_depth_and_purge_know_all_lanes(broker: RabbitMQBroker) -> None:
    await broker.publish([message(priority=priority) for priority in (9, 5, 0, 0)])
    await broker.publish([message("other", priority=9)])
    assert await broker.depth("q") == QueueDepth(ready=4, delayed=0, in_flight=None)
    await broker.publish([message(priority=priority, delay=60.0) for priority in (9, 5, 1)])
    assert await broker.purge("q") == 7
    assert await broker.depth("q") == QueueDepth(ready=0, delayed=0, in_flight=None)
    assert (await broker.depth("other")).ready == 1


async def test_a_deleted_lane_is_created_again(
    broker: RabbitMQBroker, rabbitmq_server: Service, namespace: str
) -> None:
    """And costs the other lanes nothing that is held."""
    receiver = await broker.subscribe({"q": 5})
    await broker.publish([message(priority=9), message()])
    (first,) = await collect(receiver, "q", 1)
    assert known(first)[0] == 9
    held = await collect(receiver, "q", 1)
    async with operator(rabbitmq_server.url) as channel:
        await channel.queue_delete(Names(namespace).queue("q", 9))
    await broker.publish([message(priority=9)])
    (second,) = await collect(receiver, "q", 1)
    assert known(second)[0] == 9
    assert await receiver.extend([first, *held]) == [None, *held]


async def test_lanes_do_not_keep_other_queues_waiting(broker: RabbitMQBroker) -> None:
    await broker.publish([message(priority=priority) for priority in (9, 1) for _ in range(20)])
    await broker.publish([message("other", priority=0)])
    receiver = await broker.subscribe({"q": 2, "other": 2})
    seen: set[str] = set()
    async with asyncio.timeout(60):
        while "other" not in seen:
            deliveries = await receiver.receive({"other": 2, "q": 2}, 2)
            seen |= {delivery.queue for delivery in deliveries}
            await receiver.settle([Ack(delivery) for delivery in deliveries])
    left = (await broker.depth("q")).ready
    assert left is not None
    assert left > 20


@pytest.mark.parametrize("delay", [0.0, 5.0])
def test_a_server_with_priorities_gets_them_as_a_property(delay: float) -> None:
    names = Names("app")
    low = parcel_of(message(priority=0, delay=delay))
    lane, _ = _address(names, low, by_property=False)
    assert (lane.routing_key, lane.priority) == (names.queue("q", 0), None)
    own, _ = _address(names, low, by_property=True)
    assert (own.routing_key, own.priority) == (names.queue("q"), 0)


async def test_channels_that_are_done_are_forgotten(broker: RabbitMQBroker) -> None:
    """Each question about a missing queue costs a channel. The connection keeps none of them."""
    assert broker._control is not None
    channel = await broker._control.channel()
    closing = channel._connection.closing
    before = len(closing._callbacks)
    for _ in range(5):
        await broker.depth("missing")
    assert len(closing._callbacks) == before
