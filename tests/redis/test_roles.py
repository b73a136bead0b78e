"""A server whose role changes, or that is replaced by another, under idle and busy clients."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import pytest
from redis.asyncio import Redis

from qtasks.testing.recipes import PASSWORD
from qtasks_core import DONE, Ack, Task, TaskMessage
from qtasks_core.errors import Unavailable
from qtasks_redis import RedisBroker, RedisStorage
from tests.redis.ports import Port
from tests.services import RedisServer, Service
from tests.services.service import Way


class OwnRedis(RedisServer):
    """One that only this module uses, so that its role may change."""

    def ways(self) -> tuple[Way, ...]:
        return (self.native(),)


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[Service, Service]]:
    first, second = OwnRedis(), OwnRedis()
    try:
        first.start()
        second.start()
        yield first, second
    finally:
        first.stop()
        second.stop()


class Forwarder(Port):
    """A port that leads to one server, and for new connections later to another."""

    def __init__(self, port: int) -> None:
        super().__init__()
        self.port = port

    async def serve(
        self, task: asyncio.Task[Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        there, to = await asyncio.open_connection("127.0.0.1", self.port)
        ways = [asyncio.create_task(_pump(reader, to)), asyncio.create_task(_pump(there, writer))]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            pass  # the end of the test, and of this task
        finally:
            for way in ways:
                way.cancel()
            for one in (to, writer):
                one.close()
            self._tasks.discard(task)


async def _pump(source: asyncio.StreamReader, to: asyncio.StreamWriter) -> None:
    try:
        while data := await source.read(65536):
            to.write(data)
            await to.drain()
    except OSError:
        return


def message(queue: str = "default") -> TaskMessage:
    return TaskMessage(uuid=str(uuid4()), task_name="tests:task", queue=queue)


def final(uuid: str, reply_to: str | None = None) -> Task:
    return Task(uuid=uuid, task_name="tests:task", status="success", reply_to=reply_to)


def port(service: Service) -> int:
    found = urlsplit(service.url).port
    assert found is not None
    return found


async def follow(replica: Redis, master: Service | None) -> None:
    host, of = ("NO", "ONE") if master is None else ("127.0.0.1", str(port(master)))
    await replica.config_set("masterauth", PASSWORD)
    await replica.execute_command("REPLICAOF", host, of)  # type: ignore[no-untyped-call]


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    while True:
        if await condition():
            return
        await asyncio.sleep(0.01)


async def until_blocked(server: Redis) -> list[str]:
    """Return the ids of the clients that wait in a blocking read, once there are any."""
    while True:
        clients = await server.client_list()
        if blocked := [client["id"] for client in clients if "b" in client["flags"]]:
            return blocked
        await asyncio.sleep(0.01)


@pytest.fixture
async def clients(pair: tuple[Service, Service]) -> AsyncIterator[tuple[Redis, Redis]]:
    first, second = (Redis.from_url(service.url) for service in pair)
    yield first, second
    for client in (first, second):
        await follow(client, None)
        await client.aclose()


@pytest.mark.parametrize("how", ["REPLICAOF", "CLIENT UNBLOCK"])
async def test_an_idle_receiver_lives_on_when_the_server_ends_its_read(
    pair: tuple[Service, Service], clients: tuple[Redis, Redis], how: str
) -> None:
    broker = RedisBroker(pair[0].url)
    await broker.start(str(uuid4()))
    subscription = await broker.subscribe({"default": 1})
    waiting = asyncio.create_task(subscription.receive({"default": 1}, 1))
    blocked = await until_blocked(clients[0])
    if how == "REPLICAOF":
        await follow(clients[0], pair[1])
    else:
        for client in blocked:
            await clients[0].execute_command(  # type: ignore[no-untyped-call]
                "CLIENT", "UNBLOCK", client, "ERROR"
            )
    with pytest.raises(Unavailable):
        await waiting
    if how == "REPLICAOF":
        await follow(clients[0], None)
    await broker.publish([message()])
    (delivery,) = await subscription.receive({"default": 1}, 1)
    assert await subscription.settle([Ack(delivery)]) == [DONE]
    await broker.stop()


async def test_after_a_failover_everything_goes_to_the_new_server(
    pair: tuple[Service, Service], clients: tuple[Redis, Redis]
) -> None:
    async with Forwarder(port(pair[0])) as forwarder:
        broker, storage = RedisBroker(forwarder.url), RedisStorage(forwarder.url)
        namespace = str(uuid4())
        await broker.start(namespace)
        await storage.start(namespace)
        # Many at once, so that many connections lie idle.
        await asyncio.gather(*(storage.get([str(uuid4())]) for _ in range(20)))
        await asyncio.gather(*(broker.publish([message()]) for _ in range(20)))
        inbox = await storage.inbox()
        uuid = str(uuid4())
        inbox.expect([uuid])
        hearing = asyncio.create_task(inbox.receive())

        forwarder.port = port(pair[1])
        await follow(clients[0], pair[1])
        for refused in (storage.save([final(str(uuid4()))]), broker.publish([message()])):
            with pytest.raises(Unavailable):
                await refused
        # One refusal a part is all: no other connection leads to the old server any more.
        with pytest.raises(Unavailable):
            await hearing
        again = asyncio.create_task(inbox.receive())
        for _ in range(40):
            await broker.publish([message()])
        assert await storage.save([final(uuid, inbox.address)]) == [DONE]
        assert [task.uuid for task in await again] == [uuid]
        assert await clients[1].exists(storage.started().key("record", uuid))
        await broker.stop()
        await storage.stop()


async def test_a_coordinated_failover_loses_nothing_and_the_old_server_is_left(
    pair: tuple[Service, Service], clients: tuple[Redis, Redis]
) -> None:
    first, second = clients
    await follow(second, pair[0])
    await first.config_set("masterauth", PASSWORD)

    async def in_step() -> bool:
        replication = await first.info("replication")
        return bool(replication.get("slave0", {}).get("state") == "online")

    async def handed_over() -> bool:
        told = await first.info("replication"), await second.info("replication")
        return [one["role"] for one in told] == ["slave", "master"]

    confirmed: set[str] = set()
    received: set[str] = set()
    refused = asyncio.Event()

    async def publish() -> None:
        while True:
            new = message()
            try:
                await broker.publish([new])
                confirmed.add(new.uuid)
            except Unavailable:
                refused.set()
            await asyncio.sleep(0.01)

    async def receive() -> None:
        while True:
            try:
                for delivery in await subscription.receive({"default": 9}, 9):
                    assert isinstance(delivery.message, TaskMessage)
                    received.add(delivery.message.uuid)
                    await subscription.settle([Ack(delivery)])
            except Unavailable:
                await asyncio.sleep(0.01)

    async def confirms(more: int) -> None:
        enough = len(confirmed) + more

        async def confirmed_enough() -> bool:
            return len(confirmed) >= enough

        await until(confirmed_enough)

    async def received_all() -> bool:
        assert not busy[1].done()
        return received >= confirmed

    name = f"failover-{uuid4()}"

    async def left() -> bool:
        return not any(client["name"] == name for client in await first.client_list())

    async with asyncio.timeout(60), Forwarder(port(pair[0])) as forwarder:
        await until(in_step)
        broker = RedisBroker(f"{forwarder.url}?client_name={name}")
        await broker.start(str(uuid4()))
        subscription = await broker.subscribe({"default": 9})
        idle = await broker.subscribe({"idle": 1})
        waiting = asyncio.create_task(idle.receive({"idle": 1}, 1))
        await until_blocked(first)
        busy = [asyncio.create_task(publish()), asyncio.create_task(receive())]
        await confirms(10)

        await first.execute_command(  # type: ignore[no-untyped-call]
            "FAILOVER", "TO", "127.0.0.1", str(port(pair[1]))
        )
        await until(handed_over)
        with pytest.raises(Unavailable):
            await waiting
        await refused.wait()
        forwarder.port = port(pair[1])
        await confirms(10)
        await until(left)
        again = asyncio.create_task(idle.receive({"idle": 1}, 1))
        await broker.publish([message("idle")])
        assert len(await again) == 1
        busy[0].cancel()
        await asyncio.wait(busy[:1])
        await until(received_all)
        busy[1].cancel()
        await asyncio.wait(busy)
        await broker.stop()
