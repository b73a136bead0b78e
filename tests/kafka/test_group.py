"""A member of a group: its wishes during a rebalance, and a group that it cannot find."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

import pytest
from aiokafka.structs import TopicPartition

from qtasks_core import DONE, Ack, Delivery
from qtasks_core.errors import Unavailable
from qtasks_kafka import KafkaBroker
from qtasks_kafka.assignor import KeepingAssignor
from qtasks_kafka.connection import Connection, close_consumer
from qtasks_kafka.subscription import KafkaSubscription
from tests.faults.proxy import Direction, Proxy
from tests.kafka.test_control import MOST_SECONDS, collect, messages, uuids
from tests.services import KafkaServer, Service


async def test_who_wants_partitions_again_during_a_rebalance_gets_them(
    kafka_server: Service, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has told the group that it wants none, and the driver forgets what comes meanwhile."""
    broker = KafkaBroker(kafka_server.url, lease=6.0, partitions=2)
    await broker.start(namespace)
    try:
        subscription = await broker.subscribe({"q": 1})
        assert isinstance(subscription, KafkaSubscription)
        await broker.publish(messages("before", 1))
        (delivery,) = await collect(subscription, 1)
        assert await subscription.settle([Ack(delivery)]) == [DONE]
        member, assign = subscription._member, KeepingAssignor.assign

        def assigning(*arguments: Any) -> Any:
            member.want(True)
            return assign(*arguments)

        monkeypatch.setattr(KeepingAssignor, "assign", assigning)
        member.want(False)  # as after some seconds without a receive
        async with asyncio.timeout(MOST_SECONDS):
            await member.changed
        await broker.publish(messages("after", 4))
        assert uuids(await collect(subscription, 4)) == {f"after{n}" for n in range(4)}
    finally:
        await broker.stop()


async def test_a_consumer_that_is_closed_while_it_fetches_leaves_nothing_behind(
    kafka_server: Service, namespace: str
) -> None:
    """The driver stops half-way if a fetch was about to begin: its client then lived on."""
    connection = Connection(kafka_server.url, partitions=1, replicas=None)
    await connection.start()
    try:
        await connection.ensure([namespace])
        before = asyncio.all_tasks()
        consumer = connection.consumer()
        await consumer.start()
        consumer.assign([TopicPartition(namespace, 0)])
        async with asyncio.timeout(MOST_SECONDS):
            while not consumer._fetcher._pending_tasks:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        consumer._fetcher._pending_tasks.add(asyncio.create_task(asyncio.Event().wait()))
        await close_consumer(consumer)
        assert asyncio.all_tasks() <= before
    finally:
        await connection.stop()


class Deaf(Proxy):
    """Keeps the first request for a group's coordinator to itself, and all after it."""

    kept = 0

    async def _pump(
        self, source: asyncio.StreamReader, to: asyncio.StreamWriter, direction: Direction
    ) -> None:
        while data := await source.read(65536):
            api_key = int.from_bytes(data[4:6])
            if direction == "sent" and api_key == FIND_COORDINATOR and not self.kept:
                self.kept += 1
                while await source.read(65536):
                    """The client waits for an answer, until it gives up."""
                break
            to.write(data)
            await to.drain()
        to.transport.abort()


FIND_COORDINATOR = 10
"""The number of this request in Kafka's protocol."""


async def test_a_lost_question_for_the_coordinator_is_asked_again_on_a_new_connection(
    kafka_server: KafkaServer, namespace: str
) -> None:
    """The driver waits for its answer longer than a lease, since a join may take so long."""
    lease = 10 * MOST_SECONDS
    to, listening = kafka_server.proxied()
    async with Deaf(to, listening) as proxy:
        broker = KafkaBroker(f"kafka://127.0.0.1:{proxy.port}", lease=lease)
        await broker.start(namespace)
        try:
            subscription = await broker.subscribe({"q": 1})
            await broker.publish(messages("m", 1))
            taken: list[Delivery] = []
            async with asyncio.timeout(MOST_SECONDS):
                while not taken:
                    with suppress(Unavailable):  # it says that the coordinator does not answer
                        taken = await subscription.receive({"q": 1}, 1)
            (delivery,) = taken
            assert proxy.kept == 1
            assert await subscription.settle([Ack(delivery)]) == [DONE]
        finally:
            await broker.stop()
