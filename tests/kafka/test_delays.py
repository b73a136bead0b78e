"""Whatever the topic of delayed messages holds, or a queue refuses, the others are moved."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator

import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType

from qtasks_core import DONE, Ack, Raw, Subscription, TaskMessage
from qtasks_core.wire import encode_message
from qtasks_kafka import KafkaBroker
from qtasks_kafka.connection import KEPT, topic_name
from qtasks_kafka.delays import CONFIG, delayed_topic
from tests.kafka.test_rights import GROUP, READ, TOPIC, WRITE, allow, login
from tests.services import Service
from tests.services.kafka import asking
from tests.services.secured_kafka import SecuredKafka

Headers = list[tuple[str, bytes | None]]


def message(uuid: str, queue: str = "q", *, delay: float = 0.0, size: int = 0) -> TaskMessage:
    return TaskMessage(uuid=uuid, task_name="n", queue=queue, delay=delay, args=b"S" * size)


async def received(subscription: Subscription, queue: str = "q") -> TaskMessage | Raw:
    (delivery,) = await subscription.receive({queue: 1}, 1)
    assert await subscription.settle([Ack(delivery)]) == [DONE]
    return delivery.message


@pytest.fixture
async def broker(kafka_server: Service, namespace: str) -> AsyncIterator[KafkaBroker]:
    broker = KafkaBroker(kafka_server.url, partitions=2)
    await broker.start(namespace)
    try:
        yield broker
    finally:
        await broker.stop()


FOREIGN: list[Headers] = [
    [],
    [("delay", None), ("target", b"{q}")],
    [("delay", b""), ("target", b"{q}")],
    [("delay", b"nan"), ("target", b"{q}")],
    [("delay", b"-inf"), ("target", b"{q}")],
    [("delay", b"inf"), ("target", b"{q}")],
    [("delay", b"1e999"), ("target", b"{q}")],
    [("delay", "²".encode()), ("target", b"{q}")],
    [("delay", b"\xff"), ("target", b"{q}")],
    [("delay", b"0"), ("target", None)],
    [("delay", b"0"), ("target", b"")],
    [("delay", b"0"), ("target", b"\xff\xfe")],
    [("delay", b"0"), ("target", b"no topic!")],
    [("delay", b"0"), ("target", b"..")],
    [("delay", b"0"), ("target", b"somebody_elses")],
    [("delay", b"0"), ("target", b"{q}!" + b"x" * 300)],
]


@pytest.mark.parametrize("compacted", [True, False])
async def test_foreign_records_are_dead_letters_and_hold_up_nobody(
    kafka_server: Service,
    admin: AIOKafkaAdminClient,
    namespace: str,
    broker: KafkaBroker,
    caplog: pytest.LogCaptureFixture,
    compacted: bool,
) -> None:
    topic = delayed_topic(namespace)
    config = {**KEPT, **CONFIG}
    if not compacted:
        # Only there Kafka takes records without a key.
        del config["cleanup.policy"]
    await admin.create_topics([NewTopic(topic, 2, 1, topic_configs=config)])
    queue = topic_name(namespace, "queue", "q").encode()
    producer = AIOKafkaProducer(bootstrap_servers=kafka_server.url.removeprefix("kafka://"))
    await producer.start()
    try:
        for at, headers in enumerate(FOREIGN):
            meant = [(n, v and v.replace(b"{q}", queue)) for n, v in headers]
            key = b"k%d" % at if compacted or at % 2 else None
            await producer.send_and_wait(topic, b"SECRET %d" % at, key, at % 2, headers=meant)
        # A message of ours, whose headers somebody has lost.
        late = encode_message(message("late", delay=1.0))
        await producer.send_and_wait(topic, late, b"late", 0)
    finally:
        await producer.stop()
    assert await broker.publish([message("ours", delay=0.5)]) == [DONE]
    subscription = await broker.subscribe({"q": 1})
    messages = [await received(subscription) for _ in range(len(FOREIGN) + 2)]
    raw = {one.data for one in messages if isinstance(one, Raw)}
    assert raw == {b"SECRET %d" % at for at in range(len(FOREIGN))}
    assert {one.uuid for one in messages if isinstance(one, TaskMessage)} == {"ours", "late"}
    # The mover goes on.
    assert await broker.publish([message("after", delay=0.1)]) == [DONE]
    assert getattr(await received(subscription), "uuid", None) == "after"
    told = [r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR]
    assert len([line for line in told if f"of {topic} does not have the headers" in line]) >= len(
        FOREIGN
    )
    assert "SECRET" not in caplog.text


async def test_a_message_waits_while_its_topic_takes_less(
    admin: AIOKafkaAdminClient,
    namespace: str,
    broker: KafkaBroker,
    caplog: pytest.LogCaptureFixture,
) -> None:
    topic = topic_name(namespace, "queue", "q")

    async def limit(size: int) -> None:
        configs = {"max.message.bytes": str(size), "retention.ms": "-1"}
        await admin.alter_configs([ConfigResource(ConfigResourceType.TOPIC, topic, configs)])

    subscription = await broker.subscribe({"q": 1})
    big = message("big", delay=0.5, size=100_000)
    assert await broker.publish([big, message("small", delay=0.6)]) == [DONE, DONE]
    await limit(50_000)
    assert getattr(await received(subscription), "uuid", None) == "small"
    assert await broker.publish([message("later", delay=0.1)]) == [DONE]
    assert getattr(await received(subscription), "uuid", None) == "later"
    waits = [r.getMessage() for r in caplog.records if "waits until" in r.getMessage()]
    assert len(waits) == 1
    assert topic in waits[0]
    assert "SSSS" not in caplog.text
    await limit(500_000)
    assert getattr(await received(subscription), "uuid", None) == "big"


async def test_a_message_waits_while_its_topic_may_not_be_written(
    secured: SecuredKafka, namespace: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with asking(secured.url) as operator:
        await allow(operator, GROUP, f"{namespace}.", READ)
        await allow(operator, TOPIC, f"{namespace}.", READ)
        for topic in (delayed_topic(namespace), topic_name(namespace, "queue", "mine")):
            await allow(operator, TOPIC, topic, WRITE)
        everybody = KafkaBroker(secured.url, partitions=1)
        worker = KafkaBroker(login(secured), partitions=1)
        await everybody.start(namespace)
        await worker.start(namespace)
        try:
            # Both topics exist, and `everybody` moves nothing: it subscribes to nothing.
            await everybody.publish([message("1", "others"), message("2", "mine")])
            waiting = [message("a", "others", delay=0.1), message("b", "mine", delay=0.2)]
            assert await everybody.publish(waiting) == [DONE, DONE]
            subscription = await worker.subscribe({"mine": 1, "others": 1})
            uuids = set()
            for _ in range(3):
                (delivery,) = await subscription.receive({"mine": 1, "others": 1}, 1)
                assert await subscription.settle([Ack(delivery)]) == [DONE]
                uuids.add(getattr(delivery.message, "uuid", None))
            assert uuids == {"1", "2", "b"}
            await allow(operator, TOPIC, topic_name(namespace, "queue", "others"), WRITE)
            assert getattr(await received(subscription, "others"), "uuid", None) == "a"
        finally:
            await everybody.stop()
            await worker.stop()
    assert any("waits until" in record.getMessage() for record in caplog.records)
