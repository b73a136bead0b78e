"""The least rights that docs/rights.md names are enough; one that is missing is told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.protocol.admin import CreateAclsRequest, DescribeAclsRequest
from aiokafka.protocol.metadata import MetadataRequest
from msgspec.structs import replace

from qtasks.testing.recipes import PASSWORD
from qtasks_core import DONE, Ack, Completion, Retry, Task, TaskMessage
from qtasks_core.errors import ConfigurationError
from qtasks_core.separate import compose
from qtasks_kafka import (
    KafkaBroker,
    KafkaStorage,
    ShareGroupKafkaBroker,
    TransactionalKafkaBroker,
    control,
    log,
)
from qtasks_kafka.connection import KEPT, topic_name
from qtasks_kafka.control import commands_topic
from qtasks_kafka.delays import CONFIG, delayed_topic
from tests.services.kafka import asking
from tests.services.secured_kafka import USER, SecuredKafka

# Codes of Kafka's protocol.
TOPIC, GROUP, TRANSACTIONAL_ID = 2, 3, 5
PREFIXED = 4
READ, WRITE, DESCRIBE_CONFIGS = 3, 4, 10
ALLOW = 3


@pytest.fixture
async def operator(secured: SecuredKafka) -> AsyncIterator[AIOKafkaAdminClient]:
    async with asking(secured.url) as client:
        yield client


async def allow(operator: AIOKafkaAdminClient, kind: int, prefix: str, *deeds: int) -> None:
    """Return once the server obeys: the controller answers before the brokers have heard of it."""
    for deed in deeds:
        acl = (kind, prefix, PREFIXED, f"User:{USER}", "*", deed, ALLOW)
        await operator._send_to_controller(CreateAclsRequest(*acl))
        while True:
            seen = await operator._send_request(DescribeAclsRequest(*acl))
            if seen.resources:
                break
            await asyncio.sleep(0.01)


async def make_topics(operator: AIOKafkaAdminClient, namespace: str) -> None:
    """Do what an operator does for workers that may create nothing."""
    topics = {
        topic_name(namespace, "queue", "q"): KEPT,
        topic_name(namespace, "records"): {**KEPT, **log.COMPACTED},
        delayed_topic(namespace): {**KEPT, **CONFIG},
        commands_topic(namespace): {**KEPT, **control.CONFIG},
    }
    await operator.create_topics(
        [NewTopic(topic, 2, 1, topic_configs=dict(config)) for topic, config in topics.items()]
    )
    while True:
        seen = await operator._send_request(MetadataRequest(list(topics), False))
        if not any(topic["error_code"] for topic in seen.to_object()["topics"]):
            return
        await asyncio.sleep(0.01)


def login(secured: SecuredKafka) -> str:
    return f"kafka://{USER}:{PASSWORD}@127.0.0.1:{secured.way.login}"


async def test_topics_of_an_operator_are_used_with_the_least_rights(
    secured: SecuredKafka, operator: AIOKafkaAdminClient, namespace: str
) -> None:
    await make_topics(operator, namespace)
    await allow(operator, TOPIC, f"{namespace}.", READ, WRITE)
    await allow(operator, GROUP, f"{namespace}.", READ)
    broker, storage = KafkaBroker(login(secured)), KafkaStorage(login(secured))
    await broker.start(namespace)
    await storage.start(namespace)
    try:
        message = TaskMessage(uuid="u", task_name="n", queue="q")
        assert await broker.publish([message]) == [DONE]
        subscription = await broker.subscribe({"q": 1})
        (delivery,) = await subscription.receive({"q": 1}, 1)
        assert delivery.message == message
        again = replace(message, attempt=2, delay=0.1)
        assert await subscription.settle([Retry(delivery, again)]) == [DONE]
        (delivery,) = await subscription.receive({"q": 1}, 1)
        assert isinstance(delivery.message, TaskMessage)
        assert delivery.message.attempt == 2
        record = Task(uuid="u", task_name="n", status="success")
        assert await storage.save([record]) == [DONE]
        assert await storage.get(["u"]) == [record]
        assert await subscription.settle([Ack(delivery)]) == [DONE]
    finally:
        await broker.stop()
        await storage.stop()


async def test_a_right_that_is_missing_is_named(
    secured: SecuredKafka, operator: AIOKafkaAdminClient, namespace: str
) -> None:
    await make_topics(operator, namespace)
    broker = KafkaBroker(login(secured))
    await broker.start(namespace)
    try:
        topic = topic_name(namespace, "queue", "q")
        with pytest.raises(ConfigurationError, match=f"{topic}.*DESCRIBE, READ and WRITE"):
            await broker.publish([TaskMessage(uuid="u", task_name="n", queue="q")])
        await allow(operator, TOPIC, f"{namespace}.", READ, WRITE)
        caught = await told(broker)
        assert "GroupAuthorizationFailed" in caught
        assert topic_name(namespace, "workers") in caught
        assert PASSWORD not in caught
    finally:
        await broker.stop()


async def test_transactions_need_one_right_more(
    secured: SecuredKafka, operator: AIOKafkaAdminClient, namespace: str
) -> None:
    await make_topics(operator, namespace)
    await allow(operator, TOPIC, f"{namespace}.", READ, WRITE)
    await allow(operator, GROUP, f"{namespace}.", READ)
    broker, storage = TransactionalKafkaBroker(login(secured)), KafkaStorage(login(secured))
    composition = compose(broker, storage)
    await broker.start(namespace)
    await storage.start(namespace)
    try:
        message = TaskMessage(uuid="u", task_name="n", queue="q")
        with pytest.raises(
            ConfigurationError, match="TransactionalIdAuthorizationFailed"
        ) as caught:
            await composition.submit([message])
        assert PASSWORD not in str(caught.value)
        with pytest.raises(ConfigurationError, match="TransactionalIdAuthorizationFailed"):
            await broker.subscribe({"q": 1})
        await allow(operator, TRANSACTIONAL_ID, f"{namespace}.", WRITE)
        assert await composition.submit([message]) == [DONE]
        subscription = await broker.subscribe({"q": 1})
        (delivery,) = await subscription.receive({"q": 1}, 1)
        record = Task(uuid="u", task_name="n", status="success")
        completions = [Completion(Ack(delivery), record)]
        assert await composition.complete(subscription, completions) == [DONE]
        assert await storage.get(["u"]) == [record]
    finally:
        await broker.stop()
        await storage.stop()


async def test_a_share_group_of_an_operator_is_used_with_the_least_rights(
    secured: SecuredKafka, operator: AIOKafkaAdminClient, namespace: str
) -> None:
    """Without the right to configure the group, the error has the operator's command."""
    await make_topics(operator, namespace)
    await allow(operator, TOPIC, f"{namespace}.", READ, WRITE)
    await allow(operator, GROUP, f"{namespace}.", READ)
    broker = ShareGroupKafkaBroker(login(secured), lease=20.0)
    await broker.start(namespace)
    try:
        group = topic_name(namespace, "workers")
        command = f"kafka-configs.sh --alter --group {group} --add-config share.auto.offset.reset"
        with pytest.raises(ConfigurationError, match=command) as caught:
            await broker.subscribe({"q": 1})
        assert PASSWORD not in str(caught.value)
        await ShareGroupKafkaBroker(secured.url, lease=20.0).migrate(namespace)
        await allow(operator, GROUP, f"{namespace}.", DESCRIBE_CONFIGS)
        message = TaskMessage(uuid="u", task_name="n", queue="q")
        assert await broker.publish([message]) == [DONE]
        subscription = await broker.subscribe({"q": 1})
        (delivery,) = await subscription.receive({"q": 1}, 1)
        assert delivery.message == message
        assert await subscription.settle([Ack(delivery)]) == [DONE]
    finally:
        await broker.stop()


async def told(broker: KafkaBroker) -> str:
    """Return what receiving says, once the server obeys what it was told of other rights."""
    while True:
        try:
            subscription = await broker.subscribe({"q": 1})
            await subscription.receive({"q": 1}, 1)
        except ConfigurationError as error:
            if "the topic" not in str(error):
                return str(error)
            await asyncio.sleep(0.05)
