"""Counting, purging and commands on RabbitMQ: what the shared ladder and the rights allow."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from qtasks_core import Command, QueueDepth
from qtasks_core.errors import ConfigurationError, Unavailable
from qtasks_rabbitmq import RabbitMQBroker
from qtasks_rabbitmq.delays import LEVELS
from qtasks_rabbitmq.topology import Names
from tests.rabbitmq.operator import operator
from tests.rabbitmq.test_broker import collect, message, uuids
from tests.rabbitmq.test_topology import user
from tests.services import Service

__all__ = ["user"]  # a fixture
MOST_SECONDS = 30


async def test_the_depth_knows_of_delayed_messages_whether_there_are_any(
    broker: RabbitMQBroker,
) -> None:
    """The queues of a namespace share the ladder, so only zero is known."""
    await broker.publish([message("q"), message("q")])
    assert await broker.depth("q") == QueueDepth(ready=2, delayed=0, in_flight=None)
    await broker.publish([message("other", delay=60.0)])
    assert await broker.depth("q") == QueueDepth(ready=2, delayed=None, in_flight=None)
    assert await broker.depth("never used") == QueueDepth(ready=0, delayed=None, in_flight=None)


async def test_a_purge_keeps_the_time_and_the_count_of_other_delayed_messages(
    broker: RabbitMQBroker,
) -> None:
    """Each level is read as a whole, and what belongs to other queues goes back."""
    subscription = await broker.subscribe({"other": 100})
    await broker.publish([message("other", delay=0.01)])
    await collect(subscription, "other", 1)
    loop = asyncio.get_running_loop()
    before = loop.time()
    kept = [message("other", delay=4.0) for _ in range(50)]
    dropped = [message("q", delay=delay) for delay in (4.0, 100.0, 86_400.0) for _ in range(50)]
    await broker.publish([m for pair in zip(kept, dropped, strict=False) for m in pair])
    await broker.publish(dropped[50:])
    assert await broker.purge("q") == 150
    assert await broker.purge("q") == 0
    deliveries = await collect(subscription, "other", 50)
    assert 4.0 <= loop.time() - before <= MOST_SECONDS
    assert uuids(deliveries) == {m.uuid for m in kept}
    assert {delivery.count for delivery in deliveries} == {1}
    assert (await broker.depth("q")).delayed == 0


async def test_a_purge_drops_from_a_level_that_holds_thousands(broker: RabbitMQBroker) -> None:
    """No limit of the server's holds the purge up."""
    kept = [message("other", delay=60.0) for _ in range(3000)]
    await broker.publish([m for other in kept for m in (other, message("q", delay=60.0))])
    assert await broker.purge("q") == 3000
    assert await broker.purge("other") == 3000


async def test_a_purge_of_a_queue_that_never_was_drops_nothing(broker: RabbitMQBroker) -> None:
    assert await broker.purge("never used") == 0


async def test_commands_need_no_right_to_configure(
    broker: RabbitMQBroker, user: str, namespace: str
) -> None:
    """An operator has made the stream; until then, the error says so."""
    limited = RabbitMQBroker(user)
    try:
        await limited.start(namespace)
        stream = Names(namespace).commands
        with pytest.raises(ConfigurationError, match=rf"{stream}.*may not create.*docs/rights\.md"):
            await limited.broadcast(Command(name="ping"))
        with pytest.raises(ConfigurationError, match=rf"{stream}.*may not create.*docs/rights\.md"):
            await anext(limited.commands())
        with pytest.raises(ConfigurationError, match=r"may not create.*docs/rights\.md"):
            await limited.migrate(namespace)
        await broker.migrate(namespace)
        assert await limited.migrate(namespace) == []
        async with hearing(limited) as heard:
            await say(limited, heard)
        await broker.publish([message("q"), message("q", delay=60.0)])
        assert await limited.depth("q") == QueueDepth(ready=1, delayed=None, in_flight=None)
        assert await limited.purge("q") == 2
    finally:
        await limited.stop()


@asynccontextmanager
async def hearing(broker: RabbitMQBroker) -> AsyncIterator[asyncio.Queue[Command]]:
    """Listen, again after each outage, and give the queue of what is heard."""
    heard: asyncio.Queue[Command] = asyncio.Queue()

    async def listen() -> None:
        while True:
            try:
                async for command in broker.commands():
                    heard.put_nowait(command)
            except Unavailable:
                await asyncio.sleep(0.05)

    listening = asyncio.create_task(listen())
    try:
        yield heard
    finally:
        listening.cancel()
        await asyncio.wait({listening})


async def say(broker: RabbitMQBroker, heard: asyncio.Queue[Command]) -> None:
    """Broadcast until it is heard."""
    async with asyncio.timeout(MOST_SECONDS):
        while heard.empty():
            await broker.broadcast(Command(name="ping"))
            await asyncio.sleep(0.05)


async def test_a_deleted_stream_of_commands_is_made_again(
    broker: RabbitMQBroker, rabbitmq_server: Service, namespace: str
) -> None:
    async with hearing(broker) as heard:
        await say(broker, heard)
        async with operator(rabbitmq_server.url) as channel:
            await channel.queue_delete(Names(namespace).commands)
        await broker.broadcast(Command(name="after"))
        while not heard.empty():
            heard.get_nowait()
        await say(broker, heard)


async def test_what_is_no_command_is_passed_over(
    broker: RabbitMQBroker,
    rabbitmq_server: Service,
    namespace: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    last = Command(name="last")
    async with hearing(broker) as heard:
        await say(broker, heard)
        with caplog.at_level(logging.WARNING, "qtasks.rabbitmq"):
            async with operator(rabbitmq_server.url) as channel:
                await channel.basic_publish(b"?", routing_key=Names(namespace).commands)
            await broker.broadcast(last)
            async with asyncio.timeout(MOST_SECONDS):
                while await heard.get() != last:
                    continue
    assert "a command was passed over" in caplog.text


async def test_migrating_names_what_it_creates(rabbitmq_server: Service, namespace: str) -> None:
    """Everything but the queues, which no one lists; a worker then finds all of it."""
    broker, names = RabbitMQBroker(rabbitmq_server.url), Names(namespace)
    created = await broker.migrate(namespace)
    assert len(created) == len(set(created)) == 5 + 2 * LEVELS
    assert f"queue {names.level(LEVELS - 1)} created" in created
    assert f"exchange {names.due} created" in created
    async with operator(rabbitmq_server.url) as channel:
        await channel.queue_delete(names.commands)
    assert await broker.migrate(namespace) == [f"queue {names.commands} created"]
