"""The topic of a queue changes under those who use it: it grows, or is made anew."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiokafka.admin import AIOKafkaAdminClient, NewPartitions, NewTopic

from qtasks_core import DONE, Ack, Delivery, Subscription, TaskMessage
from qtasks_core.errors import Unavailable
from qtasks_kafka import KafkaBroker
from qtasks_kafka.connection import KEPT, topic_name
from tests.services import Service


@asynccontextmanager
async def started(url: str, namespace: str) -> AsyncIterator[KafkaBroker]:
    broker = KafkaBroker(url, partitions=2)
    await broker.start(namespace)
    try:
        yield broker
    finally:
        await broker.stop()


async def publish(broker: KafkaBroker, uuids: list[str]) -> None:
    """Publish as the engine does: again while the server is out of reach."""
    messages = [TaskMessage(uuid=uuid, task_name="n", queue="q") for uuid in uuids]
    while True:
        try:
            assert set(await broker.publish(messages)) == {DONE}
            return
        except Unavailable:
            await asyncio.sleep(0.1)


async def receive(subscription: Subscription, uuids: set[str]) -> list[Delivery]:
    """Receive until each of these was there, as the engine does, and leave them unsettled."""
    missing, received = set(uuids), []
    while missing:
        try:
            deliveries = await subscription.receive({"q": 1000}, 1000)
        except Unavailable:
            await asyncio.sleep(0.1)
            continue
        received += deliveries
        missing -= {delivery.message.uuid for delivery in deliveries}  # type: ignore[union-attr]
    return received


async def settle(subscription: Subscription, deliveries: list[Delivery]) -> None:
    while True:
        try:
            await subscription.settle([Ack(delivery) for delivery in deliveries])
            return
        except Unavailable:
            await asyncio.sleep(0.1)


async def all_but_one_done(
    publisher: KafkaBroker, worker: KafkaBroker
) -> tuple[Subscription, Delivery]:
    """Work off 20 messages of a queue. Return the subscription and the delivery that it holds."""
    subscription = await worker.subscribe({"q": 1000})
    await publish(publisher, [f"old{n}" for n in range(20)])
    *done, held = await receive(subscription, {f"old{n}" for n in range(20)})
    await settle(subscription, done)
    return subscription, held


async def test_a_queue_that_grows_is_served_and_written_without_a_restart(
    kafka_server: Service, admin: AIOKafkaAdminClient, namespace: str
) -> None:
    topic = topic_name(namespace, "queue", "q")
    url = kafka_server.url
    async with started(url, namespace) as old, started(url, namespace) as worker:
        subscription = await worker.subscribe({"q": 1000})
        await publish(old, ["first"])
        await settle(subscription, await receive(subscription, {"first"}))
        await admin.create_partitions({topic: NewPartitions(6)})
        async with started(url, namespace) as new:
            await publish(old, [f"old{n}" for n in range(12)])
            await publish(new, [f"new{n}" for n in range(12)])
            wanted = {f"{who}{n}" for who in ("old", "new") for n in range(12)}
            received = await receive(subscription, wanted)
        assert len(received) == 24
        assert {delivery.fence.number for delivery in received} == set(range(6))
        await settle(subscription, received)


async def test_a_queue_made_anew_is_served_without_a_restart(
    kafka_server: Service, admin: AIOKafkaAdminClient, namespace: str
) -> None:
    """Nothing is skipped that came after, though offsets begin anew and old ones are committed."""
    topic = topic_name(namespace, "queue", "q")
    url = kafka_server.url
    async with started(url, namespace) as publisher, started(url, namespace) as worker:
        subscription, held = await all_but_one_done(publisher, worker)
        receiving = asyncio.create_task(receive(subscription, {f"new{n}" for n in range(12)}))
        await admin.delete_topics([topic])
        while True:
            answer = await admin.create_topics([NewTopic(topic, 3, 1, topic_configs=dict(KEPT))])
            if answer.topic_errors[0][1] == 0:
                break
            # Still being deleted; or a driver's question has made it, with one partition.
            await admin.delete_topics([topic])
            await asyncio.sleep(0.1)
        await publish(publisher, [f"new{n}" for n in range(12)])
        await settle(subscription, [held])
        await settle(subscription, await receiving)
        await publish(publisher, ["last"])
        await settle(subscription, await receive(subscription, {"last"}))
    # Nobody finds anything left.
    async with started(url, namespace) as publisher, started(url, namespace) as worker:
        subscription = await worker.subscribe({"q": 1000})
        await publish(publisher, ["more"])
        (delivery,) = await receive(subscription, {"more"})
        await settle(subscription, [delivery])


async def test_work_goes_on_after_a_topic_was_deleted(
    kafka_server: Service, admin: AIOKafkaAdminClient, namespace: str
) -> None:
    topic = topic_name(namespace, "queue", "q")
    url = kafka_server.url
    async with started(url, namespace) as publisher, started(url, namespace) as worker:
        subscription, held = await all_but_one_done(publisher, worker)
        await admin.delete_topics([topic])
        await publish(publisher, [f"new{n}" for n in range(12)])
        received = await receive(subscription, {f"new{n}" for n in range(12)})
        await settle(subscription, [held])
        await settle(subscription, received)
