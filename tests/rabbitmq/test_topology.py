"""What is on the server already, what somebody deletes, and the rights to make it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator

import pytest

from qtasks.testing.recipes import PASSWORD
from qtasks_core import Ack, Task, TaskMessage
from qtasks_core.errors import ConfigurationError
from qtasks_rabbitmq import RabbitMQBroker, RabbitMQStorage, delays
from qtasks_rabbitmq.topology import Names
from tests.rabbitmq.operator import operator
from tests.rabbitmq.test_broker import collect, message
from tests.rabbitmq.test_channels import patient
from tests.services import Service
from tests.services.rabbitmq import RabbitMQServer

MOST_SECONDS = 30


@pytest.fixture
def user(rabbitmq_server: RabbitMQServer, namespace: str) -> Iterator[str]:
    """The URL of a user with the least rights that docs/rights.md names."""
    rabbitmq_server.control("add_user", namespace, PASSWORD)
    ours = f"^qtasks:{namespace}:"
    rabbitmq_server.control("set_permissions", namespace, "^$", rf"{ours}|^amq\.default$", ours)
    yield rabbitmq_server.url.replace("guest:guest", f"{namespace}:{PASSWORD}")
    rabbitmq_server.control("delete_user", namespace)


async def test_what_an_operator_made_is_used_with_the_least_rights(
    broker: RabbitMQBroker, rabbitmq_server: Service, user: str, namespace: str
) -> None:
    """No right to configure: queues, delays and the stream work all the same."""
    limited, records = RabbitMQBroker(user), RabbitMQStorage(user)
    made = RabbitMQStorage(rabbitmq_server.url)
    try:
        await limited.start(namespace)
        with pytest.raises(ConfigurationError, match=r"may not create it.*docs/rights\.md"):
            await limited.publish([message("q")])
        with pytest.raises(ConfigurationError, match=r"may not create it.*docs/rights\.md"):
            await records.start(namespace)
        await broker.publish([message("q"), message("q", delay=0.01)])
        await made.start(namespace)
        await records.start(namespace)
        subscription = await patient(limited.subscribe, {"q": 5})
        await limited.publish([message("q"), message("q", delay=0.5)])
        deliveries = await collect(subscription, "q", 4)
        await subscription.settle([Ack(delivery) for delivery in deliveries])
        (outcome,) = await records.save([Task(uuid="u", task_name="t", status="success")])
        assert outcome.status == "done"
    finally:
        for part in (limited, records, made):
            await part.stop()


async def test_a_queue_that_was_made_otherwise_is_used_and_told(
    rabbitmq_server: Service, namespace: str, caplog: pytest.LogCaptureFixture
) -> None:
    """As one made on a release of the server that knew other arguments."""
    names = Names(namespace)
    async with operator(rabbitmq_server.url) as channel:
        for name in (names.queue("q"), names.lost):
            await channel.queue_declare(
                name, durable=True, arguments={"x-queue-type": "quorum", "x-delivery-limit": 15}
            )
    broker = RabbitMQBroker(rabbitmq_server.url)
    await broker.start(namespace)
    try:
        with caplog.at_level(logging.WARNING):
            subscription = await broker.subscribe({"q": 5})
            await broker.publish([message("q"), message("q", delay=0.1)])
            assert len(await collect(subscription, "q", 2)) == 2
        told = [r.getMessage() for r in caplog.records if names.queue("q") in r.getMessage()]
        assert len(told) == 1
        assert "x-delivery-limit" in told[0]
    finally:
        await broker.stop()


async def test_a_queue_that_does_not_serve_is_an_error(
    rabbitmq_server: Service, namespace: str
) -> None:
    async with operator(rabbitmq_server.url) as channel:
        await channel.queue_declare(Names(namespace).queue("q"), durable=True)
    broker = RabbitMQBroker(rabbitmq_server.url)
    await broker.start(namespace)
    with pytest.raises(ConfigurationError, match=r"x-queue-type.*Delete it"):
        await broker.publish([message("q")])
    (outcome,) = await broker.publish([message("another")])
    assert outcome.status == "done"
    await broker.stop()


async def lost(url: str, namespace: str) -> int:
    async with operator(url) as channel:
        answer = await channel.queue_declare(Names(namespace).lost, passive=True)
        return answer.message_count or 0


@pytest.mark.parametrize("meanwhile", ["a worker of another queue", "nobody"])
async def test_a_delayed_task_outlives_its_queue(
    broker: RabbitMQBroker,
    rabbitmq_server: Service,
    namespace: str,
    caplog: pytest.LogCaptureFixture,
    meanwhile: str,
) -> None:
    """Deleted before it is due and declared again later, the queue has it; and it is said."""
    receiving = None
    if meanwhile != "nobody":
        other = await broker.subscribe({"other": 1})
        receiving = asyncio.create_task(other.receive({"other": 1}, 1))
    delayed = message("q", delay=1.0)
    await broker.publish([delayed])
    async with operator(rabbitmq_server.url) as channel:
        await channel.queue_delete(Names(namespace).queue("q"))
    async with asyncio.timeout(MOST_SECONDS):
        while True:
            fallen = await lost(rabbitmq_server.url, namespace)
            if "found the queue q deleted" in caplog.text or (receiving is None and fallen):
                break
            await asyncio.sleep(0.1)
    subscription = await broker.subscribe({"q": 1})
    (delivery,) = await collect(subscription, "q", 1)
    assert isinstance(delivery.message, TaskMessage)
    assert delivery.message.uuid == delayed.uuid
    assert "found the queue q deleted" in caplog.text
    await subscription.settle([Ack(delivery)])
    assert await lost(rabbitmq_server.url, namespace) == 0
    if receiving is not None:
        receiving.cancel()
        await asyncio.wait({receiving})


def test_what_fell_out_of_the_ladder_waits_for_the_rest() -> None:
    """A level that was deleted makes nothing run early."""
    names = Names("app")
    top, headers = delays.route(10.0)
    headers["x-death"] = [{"queue": names.level(top)}]
    left = delays.left_of(names, headers)
    assert 0 < left < 10.1
    assert left == pytest.approx(
        sum(2**k * delays.UNIT for k in range(top) if headers[f"qtasks-{k}"])
    )


async def test_a_stream_that_is_made_anew_is_answered(
    rabbitmq_server: Service, namespace: str
) -> None:
    """Those who use it need no restart, though the new one is shorter than they have read."""
    first, second = (RabbitMQStorage(rabbitmq_server.url) for _ in range(2))
    try:
        for storage in (first, second):
            await storage.start(namespace)
        await first.save([Task(uuid=f"old{n}", task_name="t", status="success") for n in range(50)])
        await second.get(["old0"])
        for round_ in range(2):
            async with operator(rabbitmq_server.url) as channel:
                await channel.queue_delete(Names(namespace).log)
            async with asyncio.timeout(MOST_SECONDS):
                for saver, reader in ((first, second), (second, first)):
                    uuid = f"new{round_}{saver is first}"
                    record = Task(uuid=uuid, task_name="t", status="success")
                    (outcome,) = await patient(saver.save, [record])
                    assert outcome.status == "done"
                    (found,) = await patient(reader.get, [uuid])
                    assert found is not None
    finally:
        await first.stop()
        await second.stop()
