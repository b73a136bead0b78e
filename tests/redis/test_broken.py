"""Replies that the driver cannot read: an outage, and a connection that is not used again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import pytest
from redis import exceptions
from redis.asyncio import Redis

from qtasks_core import Task
from qtasks_core.errors import Unavailable
from qtasks_redis import RedisBroker, RedisStorage
from qtasks_redis.inbox import RedisInbox
from tests.redis.ports import Port
from tests.services import Service

BROKEN = {
    "ValueError": b"-ASK x\r\n",
    "IndexError": b"*1\r\n:1\r\n",
    "AttributeError": b"$-1\r\n",
    "InvalidResponse": b"?x\r\n",
}
"""Replies by what the driver raises for them as an answer to TIME, or was seen to raise."""


class Tampering(Port):
    """A port that leads to the server, and answers in its place while `instead` is set."""

    def __init__(self, port: int) -> None:
        super().__init__()
        self._port = port
        self.instead = b""
        self.tampered: list[asyncio.Task[Any]] = []
        """The connections on which that was done; each ends when the client closes it."""
        self._writers: set[asyncio.StreamWriter] = set()

    async def serve(
        self, task: asyncio.Task[Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        there, to = await asyncio.open_connection("127.0.0.1", self._port)
        self._writers.add(writer)
        back = asyncio.create_task(self._answer(there, writer))
        try:
            while data := await reader.read(65536):
                if not self.instead:
                    to.write(data)
                    continue
                if task not in self.tampered:
                    self.tampered.append(task)
                writer.write(self.instead)
        except (asyncio.CancelledError, OSError):
            pass  # the end of the test, or of the client
        finally:
            back.cancel()
            for one in (to, writer):
                one.close()
            self._writers.discard(writer)
            self._tasks.discard(task)

    async def _answer(self, there: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await there.read(65536):
            writer.write(data)

    def push(self, data: bytes) -> None:
        """Send what no one asked for, on every connection."""
        for writer in self._writers:
            writer.write(data)


@pytest.fixture
async def wire(redis_server: Service) -> AsyncIterator[Tampering]:
    port = urlsplit(redis_server.url).port
    assert port is not None
    async with Tampering(port) as tampering:
        yield tampering


@pytest.mark.parametrize("reply", BROKEN.values(), ids=list(BROKEN))
async def test_a_broken_reply_is_an_outage_and_ends_its_connection(
    wire: Tampering, reply: bytes
) -> None:
    storage = RedisStorage(wire.url)
    await storage.start(str(uuid4()))
    wire.instead = reply
    with pytest.raises(Unavailable):
        await storage.clock()
    wire.instead = b""
    async with asyncio.timeout(120):
        await asyncio.wait(wire.tampered)
    assert await storage.clock()
    assert await storage.get(["a"]) == [None]
    await storage.stop()


@pytest.mark.parametrize("reply", [b"-ASK x\r\n", b"?x\r\n"], ids=["ValueError", "InvalidResponse"])
async def test_a_broken_push_is_an_outage_of_the_inbox(wire: Tampering, reply: bytes) -> None:
    storage = RedisStorage(wire.url)
    await storage.start(str(uuid4()))
    inbox = await storage.inbox()
    record = Task(uuid=str(uuid4()), task_name="tests:task", status="success")
    inbox.expect([record.uuid])
    hearing = asyncio.create_task(inbox.receive())
    wire.push(reply)
    async with asyncio.timeout(120):
        with pytest.raises(Unavailable):
            await hearing
        await storage.save([_to(record, inbox.address)])
        assert [task.uuid for task in await inbox.receive()] == [record.uuid]
    await storage.stop()


@pytest.mark.parametrize("reply", [b"+OK\r\n", b"*0\r\n", b":1\r\n"])
async def test_a_server_that_does_not_know_hello(reply: bytes) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(65536):
            writer.write(reply)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    with pytest.raises(Unavailable):
        await RedisBroker(f"redis://127.0.0.1:{port}").start("tests")
    server.close()


async def test_a_fault_of_our_own_is_not_taken_for_an_outage(
    redis_server: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = RedisStorage(redis_server.url)
    await storage.start(str(uuid4()))
    inbox = await storage.inbox()
    record = Task(uuid=str(uuid4()), task_name="tests:task", status="success")
    inbox.expect([record.uuid])

    def faulty(self: RedisInbox, tasks: object) -> None:
        raise ValueError("a fault of our own")

    monkeypatch.setattr(RedisInbox, "_take", faulty)
    await storage.save([_to(record, inbox.address)])
    async with asyncio.timeout(120):
        with pytest.raises(ValueError, match="a fault of our own"):
            await inbox.receive()
    monkeypatch.undo()
    await storage.stop()


async def test_a_connection_that_cannot_be_closed_does_not_matter(
    redis_server: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker = RedisBroker(redis_server.url)
    await broker.start(str(uuid4()))
    close = Redis.aclose

    async def late(self: Redis) -> None:
        await close(self)
        raise exceptions.TimeoutError("Timed out closing connection after 3.0")

    monkeypatch.setattr(Redis, "aclose", late)
    await broker.stop()


async def test_a_deadline_of_the_caller_stays_one(redis_server: Service) -> None:
    broker = RedisBroker(redis_server.url)
    await broker.start(str(uuid4()))
    subscription = await broker.subscribe({"default": 1})
    with pytest.raises(TimeoutError) as caught:
        async with asyncio.timeout(0.2):
            await subscription.receive({"default": 1}, 1)
    assert type(caught.value) is TimeoutError
    await broker.stop()


def _to(record: Task, address: str) -> Task:
    return Task(
        uuid=record.uuid, task_name=record.task_name, status=record.status, reply_to=address
    )
