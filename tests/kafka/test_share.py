"""A share group as the broker: what the kit does not ask of every broker."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from itertools import count

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient, NewPartitions
from uuid_utils import uuid7

from qtasks_core import Ack, Delivery, Release, Subscription, TaskMessage
from qtasks_core.errors import ConfigurationError
from qtasks_core.wire import encode_message
from qtasks_kafka import ShareGroupKafkaBroker, share_group
from qtasks_kafka.connection import topic_name
from qtasks_kafka.control import workers_group
from qtasks_kafka.share_session import PRIOR
from tests.services import Service

LEASE = 60.0
"""Seconds: longer than a test."""


def message() -> TaskMessage:
    return TaskMessage(uuid=str(uuid7()), task_name="t", queue="q")


@pytest.fixture
async def broker(kafka_server: Service, namespace: str) -> AsyncIterator[ShareGroupKafkaBroker]:
    broker = ShareGroupKafkaBroker(kafka_server.url, lease=LEASE, partitions=1)
    await broker.start(namespace)
    yield broker
    await broker.stop()


async def receive(subscription: Subscription, most: int = 1) -> list[Delivery]:
    async with asyncio.timeout(60):
        return await subscription.receive({"q": most}, most)


async def test_a_message_outlives_the_servers_limit_of_deliveries(
    broker: ShareGroupKafkaBroker,
) -> None:
    """The server archives a record after some deliveries, so a copy replaces it before."""
    sent = message()
    await broker.publish([sent])
    subscription = await broker.subscribe({"q": 1})
    for times in range(1, 2 * int(share_group.WISHES[share_group.LIMIT])):
        (delivery,) = await receive(subscription)
        assert (delivery.message, delivery.count) == (sent, times)
        (outcome,) = await subscription.settle([Release(delivery)])
        assert outcome.status == "done"


async def test_there_may_be_more_workers_than_partitions(broker: ShareGroupKafkaBroker) -> None:
    """Each of five receivers gets a message of the one partition, while the others hold theirs."""
    sent = [message() for _ in range(5)]
    await broker.publish(sent)
    subscriptions = [await broker.subscribe({"q": 1}) for _ in sent]
    held = [(await receive(each))[0] for each in subscriptions]
    assert {d.message.uuid for d in held if isinstance(d.message, TaskMessage)} == {
        each.uuid for each in sent
    }


async def test_a_slow_task_holds_back_nobody(broker: ShareGroupKafkaBroker) -> None:
    """Behind a message that is never finished, the partition is read to its end."""
    await broker.publish([message()])
    subscription = await broker.subscribe({"q": 100})
    (slow,) = await receive(subscription)
    await broker.publish([message() for _ in range(1500)])
    finished = 0
    while finished < 1500:
        some = await receive(subscription, 100)
        outcomes = await subscription.settle([Ack(delivery) for delivery in some])
        assert {outcome.status for outcome in outcomes} == {"done"}
        finished += len(some)
    assert await subscription.extend([slow]) == [slow]


async def test_marks_of_transactions_are_passed_over(
    broker: ShareGroupKafkaBroker, kafka_server: Service, namespace: str
) -> None:
    """A mark of a transaction is no message, and nothing comes again because of it."""
    subscription = await broker.subscribe({"q": 10})
    servers = kafka_server.url.removeprefix("kafka://")
    producer = AIOKafkaProducer(bootstrap_servers=servers, transactional_id=namespace)
    await producer.start()
    topic = topic_name(namespace, "queue", "q")
    for number in range(3):
        async with producer.transaction():
            await producer.send_and_wait(topic, str(number).encode())
    await producer.stop()
    came: list[Delivery] = []
    while len(came) < 3:
        came += await receive(subscription, 10)
    await subscription.settle([Ack(delivery) for delivery in came])
    async with asyncio.timeout(60):
        for _ in count():
            depth = await broker.depth("q")
            if (depth.ready, depth.in_flight) == (0, 0):
                break
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2):
                    await subscription.receive({"q": 10}, 10)


async def test_new_partitions_are_read(
    broker: ShareGroupKafkaBroker,
    admin: AIOKafkaAdminClient,
    namespace: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(share_group, "LOOK_AGAIN", 0.5)

    subscription = await broker.subscribe({"q": 10})
    topic = topic_name(namespace, "queue", "q")
    await admin.create_partitions({topic: NewPartitions(3)})
    servers = admin._client._bootstrap_servers
    producer = AIOKafkaProducer(bootstrap_servers=servers, metadata_max_age_ms=200)
    await producer.start()
    while len(await producer.partitions_for(topic)) < 3:
        await producer.client.force_metadata_update()
    await producer.send_and_wait(topic, b"new", partition=2)
    await producer.stop()
    (delivery,) = await receive(subscription, 10)
    assert delivery.fence.place[1] == 2


async def test_workers_of_both_kinds_exclude_each_other(
    kafka_server: Service, namespace: str, broker: ShareGroupKafkaBroker
) -> None:
    """Both kinds would run each message. Who comes second is told what to do."""
    servers = kafka_server.url.removeprefix("kafka://")
    topic, group = topic_name(namespace, "queue", "q"), workers_group(namespace)
    await broker.publish([message()])
    consumer = AIOKafkaConsumer(topic, bootstrap_servers=servers, group_id=group)
    await consumer.start()
    try:
        with pytest.raises(ConfigurationError, match=rf"--delete --group {group}"):
            await broker.subscribe({"q": 1})
    finally:
        await consumer.stop()


async def test_a_lease_that_the_server_refuses_is_told(
    kafka_server: Service, namespace: str
) -> None:
    broker = ShareGroupKafkaBroker(kafka_server.url, lease=0.5)
    await broker.start(namespace)
    with pytest.raises(ConfigurationError, match=r"group\.share\.min\.record\.lock\.duration"):
        await broker.subscribe({"q": 1})
    await broker.stop()


async def test_migrate_configures_the_group(kafka_server: Service, namespace: str) -> None:
    """It says what it has set, and the second time that there is nothing to do."""
    broker = ShareGroupKafkaBroker(kafka_server.url, lease=20.0)
    done = await broker.migrate(namespace)
    assert f"group {workers_group(namespace)}: share.auto.offset.reset=earliest" in done
    assert f"group {workers_group(namespace)}: share.record.lock.duration.ms=20000" in done
    assert await broker.migrate(namespace) == []


@pytest.mark.parametrize("value", [b"many", b"-1", b"9" * 30, None])
async def test_a_foreign_header_is_no_count_of_deliveries(
    broker: ShareGroupKafkaBroker, kafka_server: Service, namespace: str, value: bytes | None
) -> None:
    subscription = await broker.subscribe({"q": 1})
    servers = kafka_server.url.removeprefix("kafka://")
    producer = AIOKafkaProducer(bootstrap_servers=servers)
    await producer.start()
    topic = topic_name(namespace, "queue", "q")
    await producer.send_and_wait(topic, encode_message(message()), headers=[(PRIOR, value)])
    await producer.stop()
    (delivery,) = await receive(subscription)
    assert delivery.count == 1
