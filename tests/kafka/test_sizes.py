"""What is larger than a topic takes is refused by itself, whoever made the topic."""

from __future__ import annotations

import pytest
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from qtasks_core import DONE, Task, TaskMessage
from qtasks_kafka import KafkaBroker, KafkaStorage
from qtasks_kafka.connection import topic_name
from tests.services import Service

LIMIT = 100_000


async def make(admin: AIOKafkaAdminClient, topic: str) -> None:
    configs = {"max.message.bytes": str(LIMIT), "retention.ms": "-1"}
    await admin.create_topics([NewTopic(topic, 2, 1, topic_configs=configs)])


async def limit(admin: AIOKafkaAdminClient, topic: str, size: int) -> None:
    """Have a topic take less from now on; nobody who uses it hears of that."""
    from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType

    configs = {"max.message.bytes": str(size), "retention.ms": "-1"}
    await admin.alter_configs([ConfigResource(ConfigResourceType.TOPIC, topic, configs)])


def ended(uuid: str, size: int) -> Task:
    return Task(uuid=uuid, task_name="n", status="success", returning=b"x" * size)


@pytest.mark.parametrize("known", [True, False])
async def test_one_record_over_the_limit_holds_up_no_other(
    kafka_server: Service, admin: AIOKafkaAdminClient, namespace: str, known: bool
) -> None:
    topic = topic_name(namespace, "records")
    if known:
        await make(admin, topic)
    storage = KafkaStorage(kafka_server.url, partitions=2)
    await storage.start(namespace)
    try:
        if not known:
            await limit(admin, topic, LIMIT)
        # Together they are larger than a batch may be; by itself each but one is small enough.
        tasks = [ended(f"u{number}", 30_000) for number in range(10)]
        tasks[5] = ended("big", 130_000)
        outcomes = await storage.save(tasks)
        assert [o.status for o in outcomes] == ["done"] * 5 + ["refused"] + ["done"] * 4
        assert "max.message.bytes" in outcomes[5].reason
        assert outcomes[5].current is None
        # The producer goes on as if nothing had been.
        assert await storage.save([ended("later", 10)]) == [DONE]
        assert await storage.get(["big"]) == [None]
        assert [task is not None for task in await storage.get(["u0", "u9", "later"])] == [True] * 3
    finally:
        await storage.stop()


@pytest.mark.parametrize("known", [True, False])
async def test_one_message_over_the_limit_holds_up_no_other(
    kafka_server: Service, admin: AIOKafkaAdminClient, namespace: str, known: bool
) -> None:
    topic = topic_name(namespace, "queue", "q")
    if known:
        await make(admin, topic)
    broker = KafkaBroker(kafka_server.url, partitions=2)
    await broker.start(namespace)
    try:
        small = [
            TaskMessage(uuid=f"u{n}", task_name="n", queue="q", args=b"x" * 30_000)
            for n in range(10)
        ]
        if not known:
            await broker.publish(small[:1])
            await limit(admin, topic, LIMIT)
        big = TaskMessage(uuid="big", task_name="n", queue="q", args=b"x" * 130_000)
        outcomes = await broker.publish([*small, big])
        assert [o.status for o in outcomes] == ["done"] * 10 + ["refused"]
        assert await broker.publish(small[:1]) == [DONE]
    finally:
        await broker.stop()
