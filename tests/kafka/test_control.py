"""Counting, purging and commands on Kafka: across members of the group, and without any."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator

import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient

from qtasks_core import DONE, Ack, Command, Delivery, QueueDepth, Subscription, TaskMessage
from qtasks_core.errors import ConfigurationError, Unavailable
from qtasks_kafka import KafkaBroker
from qtasks_kafka.control import Purge, commands_topic
from qtasks_kafka.subscription import KafkaSubscription
from tests.kafka.test_rights import GROUP, READ, TOPIC, WRITE, allow, login, make_topics, operator
from tests.services import Service
from tests.services.secured_kafka import SecuredKafka

__all__ = ["operator"]  # a fixture
MOST_SECONDS = 60
NOTHING = QueueDepth(ready=0, delayed=0, in_flight=0)
DELETE = 6  # a code of Kafka's protocol


def message(uuid: str, queue: str = "q", *, delay: float = 0.0) -> TaskMessage:
    return TaskMessage(uuid=uuid, task_name="n", queue=queue, delay=delay)


def messages(name: str, count: int, queue: str = "q", *, delay: float = 0.0) -> list[TaskMessage]:
    return [message(f"{name}{number}", queue, delay=delay) for number in range(count)]


async def collect(subscription: Subscription, count: int, queue: str = "q") -> list[Delivery]:
    deliveries: list[Delivery] = []
    async with asyncio.timeout(MOST_SECONDS):
        while len(deliveries) < count:
            missing = count - len(deliveries)
            deliveries += await subscription.receive({queue: missing}, missing)
    return deliveries


def uuids(deliveries: list[Delivery]) -> set[str]:
    return {d.message.uuid for d in deliveries if isinstance(d.message, TaskMessage)}


@pytest.fixture
async def brokers(kafka_server: Service, namespace: str) -> AsyncIterator[list[KafkaBroker]]:
    """Three brokers of one app."""
    brokers = [KafkaBroker(kafka_server.url, lease=6.0, partitions=4) for _ in range(3)]
    for broker in brokers:
        await broker.start(namespace)
    yield brokers
    for broker in brokers:
        await broker.stop()


async def test_a_purge_reaches_every_member(brokers: list[KafkaBroker]) -> None:
    """Two members hold some messages of many. Both drop the rest, which a third one purges.

    A member that leaves gives back what it held, and nothing else.
    """
    one, other, purger = brokers
    first, second = await one.subscribe({"q": 4}), await other.subscribe({"q": 4})
    await share(purger, first, second)
    assert await purger.publish(messages("m", 200)) == [DONE] * 200
    held = {first: await collect(first, 4), second: await collect(second, 4)}
    assert await purger.purge("q") == 200 - 8
    assert await purger.depth("q") == QueueDepth(ready=0, delayed=0, in_flight=8)
    assert await purger.purge("q") == 0
    for subscription, deliveries in held.items():
        assert await subscription.extend(deliveries) == deliveries
    assert await second.settle([Ack(delivery) for delivery in held[second]]) == [DONE] * 4
    await one.stop()
    again = await collect(second, 4)
    assert uuids(again) == uuids(held[first])
    await second.settle([Ack(delivery) for delivery in again])
    assert await purger.publish([message("after")]) == [DONE]
    assert uuids(await collect(second, 1)) == {"after"}


async def share(publisher: KafkaBroker, *subscriptions: Subscription) -> None:
    """Return once each of these members has partitions, and nothing is in flight."""
    busy: set[Subscription] = set()

    async def drain(subscription: Subscription) -> None:
        while True:
            deliveries = await subscription.receive({"q": 1}, 1)
            await subscription.settle([Ack(delivery) for delivery in deliveries])
            busy.add(subscription)

    draining = [asyncio.create_task(drain(subscription)) for subscription in subscriptions]
    async with asyncio.timeout(MOST_SECONDS):
        while len(busy) < len(subscriptions):
            busy.clear()
            await publisher.publish(messages("warm", 4))
            while await publisher.depth("q") != NOTHING:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
    for task in draining:
        task.cancel()
    await asyncio.wait(draining)


async def test_without_members_a_purge_deletes_what_was_in_flight_too(
    brokers: list[KafkaBroker],
) -> None:
    """Nobody holds it any more."""
    one, other, _ = brokers
    subscription = await one.subscribe({"q": 3})
    await one.publish(messages("m", 10))
    await collect(subscription, 3)
    await one.stop()
    assert await other.depth("q") == QueueDepth(ready=10, delayed=0, in_flight=0)
    assert await other.purge("q") == 10
    assert await other.purge("q") == 0
    assert await other.depth("q") == NOTHING
    later = await other.subscribe({"q": 3})
    await other.publish([message("after")])
    assert uuids(await collect(later, 1)) == {"after"}


async def test_a_purge_spares_delayed_messages_of_other_queues(
    brokers: list[KafkaBroker],
) -> None:
    """They share a topic. The depth of a queue counts only its own."""
    one, other, _ = brokers
    assert await one.publish(messages("q", 5, delay=60.0)) == [DONE] * 5
    assert await one.publish(messages("x", 3, "other", delay=1.0)) == [DONE] * 3
    assert await other.depth("q") == QueueDepth(ready=0, delayed=5, in_flight=0)
    assert await other.purge("q") == 5
    assert await other.depth("q") == NOTHING
    subscription = await one.subscribe({"other": 3})
    assert uuids(await collect(subscription, 3, "other")) == {"x0", "x1", "x2"}
    assert await other.depth("other") == QueueDepth(ready=0, delayed=0, in_flight=3)


async def test_a_member_that_does_not_answer_makes_a_purge_unavailable(
    brokers: list[KafkaBroker], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its partitions cannot be purged by others. The next call finds it again."""
    one, other, _ = brokers

    async def deaf(*_: object) -> dict[int, int]:
        return {}

    subscription = await one.subscribe({"q": 1})
    await one.publish(messages("m", 10))
    (held,) = await collect(subscription, 1)
    with monkeypatch.context() as patch:
        patch.setattr(KafkaSubscription, "drop", deaf)
        with pytest.raises(Unavailable, match="not every worker"):
            await other.purge("q")
    assert await other.purge("q") == 9
    assert await subscription.settle([Ack(held)]) == [DONE]


async def test_a_request_that_is_made_again_drops_nothing_new(
    brokers: list[KafkaBroker],
) -> None:
    """An offset is the bound, so what comes after the first request stays."""
    one, other, _ = brokers
    subscription = await one.subscribe({"q": 1})
    assert isinstance(subscription, KafkaSubscription)
    await one.publish(messages("m", 8))
    await collect(subscription, 1)
    topic = one.topic("q")
    ends = {0: 2, 1: 2, 2: 2, 3: 2}
    assert sum((await subscription.drop(topic, ends)).values()) == 7
    await other.publish(messages("new", 8))
    assert sum((await subscription.drop(topic, ends)).values()) == 0
    assert uuids(await collect(subscription, 8)) == {m.uuid for m in messages("new", 8)}


async def test_what_is_no_command_is_passed_over(
    brokers: list[KafkaBroker],
    kafka_server: Service,
    namespace: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Also what processes say to each other about a purge."""
    broker, other, _ = brokers
    commands = broker.commands()
    hearing = asyncio.ensure_future(anext(commands))
    while not hearing.done():
        await other.broadcast(Command(name="ping"))
        await asyncio.wait({hearing}, timeout=0.1)
    producer = AIOKafkaProducer(bootstrap_servers=kafka_server.url.removeprefix("kafka://"))
    await producer.start()
    with caplog.at_level(logging.WARNING, "qtasks.kafka"):
        for value, headers in ((b"?", []), (None, []), (b"{}", [("qtasks", b"")])):
            await producer.send_and_wait(
                commands_topic(namespace), value, key=b"foreign", headers=headers, partition=0
            )
        await producer.stop()
        assert other._listeners is not None
        await other._listeners.say(Purge("id", "no topic of ours", {0: 1}))
        await other.broadcast(Command(name="last"))
        async with asyncio.timeout(MOST_SECONDS):
            while (await anext(commands)).name != "last":
                continue
    assert caplog.text.count("a command was passed over") == 3
    await commands.aclose()  # type: ignore[attr-defined]


@pytest.mark.parametrize("fault", [ValueError("a fault of our own"), asyncio.CancelledError()])
async def test_a_fault_in_reading_commands_is_told_to_all_who_wait(
    brokers: list[KafkaBroker], monkeypatch: pytest.MonkeyPatch, fault: BaseException
) -> None:
    """Whatever ends the reading, no listener waits for ever; the next one reads again."""
    broker, other, _ = brokers
    hearing = [asyncio.ensure_future(anext(broker.commands())) for _ in range(2)]
    listeners = broker._listening()
    while len(listeners._heard) < 2:  # noqa: ASYNC110  nothing tells
        await asyncio.sleep(0.01)

    def fail(*_: object) -> None:
        raise fault

    with monkeypatch.context() as patched:
        patched.setattr(listeners, "_pass_on", fail)
        async with asyncio.timeout(MOST_SECONDS):
            while not all(each.done() for each in hearing):
                await other.broadcast(Command(name="ping"))
                await asyncio.wait(hearing, timeout=0.1)
    expected = Unavailable if isinstance(fault, asyncio.CancelledError) else ValueError
    for each in hearing:
        with pytest.raises(expected):
            await each
    again = asyncio.ensure_future(anext(broker.commands()))
    async with asyncio.timeout(MOST_SECONDS):
        while not again.done():
            await other.broadcast(Command(name="ping"))
            await asyncio.wait({again}, timeout=0.1)
    assert again.result().name == "ping"


async def test_the_topic_of_commands_stays_small(
    brokers: list[KafkaBroker], admin: AIOKafkaAdminClient, namespace: str
) -> None:
    await brokers[0].broadcast(Command(name="ping"))
    (described,) = await admin.describe_topics([commands_topic(namespace)])
    assert len(described["partitions"]) == 1


async def test_migrating_names_what_it_creates(kafka_server: Service, namespace: str) -> None:
    broker = KafkaBroker(kafka_server.url, partitions=2)
    created = await broker.migrate(namespace)
    assert created == [f"topic {namespace}.{name} created" for name in ("delayed", "commands")]
    assert await broker.migrate(namespace) == []


async def test_a_purge_of_a_queue_that_never_was_drops_nothing(
    brokers: list[KafkaBroker], admin: AIOKafkaAdminClient
) -> None:
    """Neither call creates its topic."""
    broker = brokers[0]
    assert await broker.depth("never") == NOTHING
    assert await broker.purge("never") == 0
    assert broker.topic("never") not in await admin.list_topics()


async def test_what_operators_do_needs_few_rights(
    secured: SecuredKafka, operator: AIOKafkaAdminClient, namespace: str
) -> None:
    """Purging needs the right to DELETE where no worker has the partition, and says so."""
    await make_topics(operator, namespace)
    await allow(operator, TOPIC, f"{namespace}.", READ, WRITE)
    await allow(operator, GROUP, f"{namespace}.", READ)
    broker = KafkaBroker(login(secured))
    await broker.start(namespace)
    try:
        assert await broker.publish([*messages("m", 4), message("late", delay=60.0)]) == [DONE] * 5
        assert await broker.depth("q") == QueueDepth(ready=4, delayed=1, in_flight=0)
        with pytest.raises(ConfigurationError, match=rf"right to DELETE.*{namespace}\.queue\.q"):
            await broker.purge("q")
        subscription = await broker.subscribe({"q": 1})
        await collect(subscription, 1)
        assert await broker.purge("q") == 3
        await broker.broadcast(Command(name="ping"))
    finally:
        await broker.stop()
