"""The server forgets what a group without workers has done: that must not run again."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.protocol.api import Request, RequestStruct, Response
from aiokafka.protocol.types import Array, Int16, Int32, Schema, String

from qtasks_core import DONE, Ack, Subscription, TaskMessage
from qtasks_kafka import KafkaBroker, floor
from qtasks_kafka.connection import topic_name
from tests.kafka.test_rights import GROUP, READ, TOPIC, WRITE, allow, login, make_topics
from tests.processes import until
from tests.services import Service
from tests.services.kafka import asking
from tests.services.secured_kafka import SecuredKafka


class DeleteGroupsResponse_v0(Response):  # type: ignore[misc]
    API_KEY = 42
    API_VERSION = 0
    SCHEMA = Schema(
        ("throttle_time_ms", Int32),
        ("results", Array(("group_id", String("utf-8")), ("error_code", Int16))),
    )


class DeleteGroupsRequest_v0(RequestStruct):  # type: ignore[misc]
    API_KEY = 42
    API_VERSION = 0
    RESPONSE_TYPE = DeleteGroupsResponse_v0
    SCHEMA = Schema(("groups_names", Array(String("utf-8"))))


class DeleteGroups(Request[DeleteGroupsRequest_v0]):  # type: ignore[misc]
    API_KEY = 42

    def __init__(self, *groups: str) -> None:
        self._groups = list(groups)

    def build(self, request_struct_class: type[DeleteGroupsRequest_v0]) -> DeleteGroupsRequest_v0:
        return request_struct_class(self._groups)


@asynccontextmanager
async def started(url: str, namespace: str) -> AsyncIterator[KafkaBroker]:
    broker = KafkaBroker(url, partitions=2)
    await broker.start(namespace)
    try:
        yield broker
    finally:
        await broker.stop()


async def publish(broker: KafkaBroker, *uuids: str) -> None:
    messages = [TaskMessage(uuid=uuid, task_name="n", queue="q") for uuid in uuids]
    assert set(await broker.publish(messages)) == {DONE}


async def work(subscription: Subscription, number: int) -> set[str]:
    """Run that many tasks to their end; return their uuids."""
    uuids: set[str] = set()
    while len(uuids) < number:
        deliveries = await subscription.receive({"q": 10}, 10)
        uuids |= {delivery.message.uuid for delivery in deliveries}  # type: ignore[union-attr]
        outcomes = await subscription.settle([Ack(delivery) for delivery in deliveries])
        assert set(outcomes) == {DONE}
    return uuids


async def forget(admin: AIOKafkaAdminClient, namespace: str) -> None:
    """Delete what the group has committed, as the server does after its offsets' retention."""
    group = topic_name(namespace, "workers")
    while True:
        coordinator = await admin.find_coordinator(group)
        answer = await admin._send_request(DeleteGroups(group), coordinator)
        if answer.results[0][1] == 0:
            return
        await asyncio.sleep(0.05)  # Its last member is still leaving.


async def test_what_is_done_does_not_run_again_when_its_offsets_are_forgotten(
    kafka_server: Service, admin: AIOKafkaAdminClient, namespace: str
) -> None:
    old = [f"old{n}" for n in range(20)]
    async with started(kafka_server.url, namespace) as broker:
        await publish(broker, *old)
        assert await work(await broker.subscribe({"q": 10}), 20) == set(old)
        # Nobody has done this one yet, in whichever partition it is.
        await publish(broker, "waits")
    await forget(admin, namespace)
    async with started(kafka_server.url, namespace) as broker:
        await publish(broker, "new")
        assert await work(await broker.subscribe({"q": 10}), 2) == {"waits", "new"}


async def test_a_queue_without_a_commit_is_read_from_its_beginning(
    kafka_server: Service, admin: AIOKafkaAdminClient, namespace: str
) -> None:
    early = [f"early{n}" for n in range(5)]
    async with started(kafka_server.url, namespace) as broker:
        await publish(broker, *early)
    async with started(kafka_server.url, namespace) as broker:
        assert await work(await broker.subscribe({"q": 10}), 5) == set(early)


async def test_a_user_who_may_not_delete_is_told_once(
    secured: SecuredKafka,
    namespace: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(floor, "PERIOD", 0.2)

    def told() -> int:
        said = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
        return len([line for line in said if "the right to DELETE" in line])

    async with asking(secured.url) as operator:
        await make_topics(operator, namespace)
        await allow(operator, GROUP, f"{namespace}.", READ)
        await allow(operator, TOPIC, f"{namespace}.", READ, WRITE)
    async with started(login(secured), namespace) as broker:
        subscription = await broker.subscribe({"q": 10})
        await publish(broker, "one")
        assert await work(subscription, 1) == {"one"}
        await asyncio.to_thread(until, lambda: told() > 0, "the warning")
        await publish(broker, "two")
        assert await work(subscription, 1) == {"two"}
    assert told() == 1
