"""A user needs the rights that docs/rights.md lists, and is told which are missing."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from urllib.parse import urlsplit
from uuid import uuid4

import pytest
from redis.asyncio import Redis

from qtasks_core import DONE, Ack, Command, Completion, Release, Retry, Task, TaskMessage, TaskQuery
from qtasks_core.errors import ConfigurationError
from qtasks_redis import RedisBroker, RedisStorage
from tests.processes import ROOT
from tests.services import Service

PAGE = (ROOT / "docs" / "rights.md").read_text().partition("## Redis")[2]
ROW = re.compile(r"^\| (both|broker|storage) \| (.+) \|$", re.MULTILINE)
RIGHTS = {part: re.findall(r"`(.+?)`", listed) for part, listed in ROW.findall(PAGE)}


class User:
    """A user of the server whose rights a test sets."""

    def __init__(self, server: Redis, port: int | None) -> None:
        self._server = server
        self.name = f"user-{uuid4().hex}"
        self.namespace = f"app-{uuid4().hex}"
        self.url = f"redis://{self.name}:sesame@127.0.0.1:{port}/0"

    async def may(self, *rights: str) -> None:
        named = [right.replace("NAME", self.namespace) for right in rights]
        await self._server.execute_command(  # type: ignore[no-untyped-call]
            "ACL", "SETUSER", self.name, "reset", "resetchannels", "on", ">sesame", *named
        )


@pytest.fixture
async def user(redis_server: Service) -> AsyncIterator[User]:
    client: Redis = Redis.from_url(redis_server.url)
    user = User(client, urlsplit(redis_server.url).port)
    yield user
    await client.acl_deluser(user.name)
    await client.aclose()


async def test_both_parts_with_the_documented_rights(user: User) -> None:
    await user.may(*RIGHTS["both"], *RIGHTS["broker"])
    broker = RedisBroker(user.url)
    await broker.start(user.namespace)
    subscription = await broker.subscribe({"default": 10})
    waiting = asyncio.create_task(subscription.receive({"default": 2}, 2))
    messages = [
        TaskMessage(uuid=str(uuid4()), task_name="tests:task", delay=delay, priority=priority)
        for delay, priority in ((0, 9), (0.1, 5))
    ]
    await broker.publish(messages)
    one, *_ = await waiting
    assert await subscription.extend([one]) == [one]
    assert await subscription.settle([Release(one)]) == [DONE]
    (one,) = await subscription.receive({"default": 1}, 1)
    assert await subscription.settle([Retry(one, messages[1])]) == [DONE]
    (one,) = await subscription.receive({"default": 1}, 1)
    assert await subscription.settle([Ack(one)]) == [DONE]

    async def hear() -> Command:
        return await anext(broker.commands())

    heard = asyncio.create_task(hear())
    while not heard.done():
        await broker.broadcast(Command(name="ping"))
        await asyncio.wait({heard}, timeout=0.05)
    assert (await broker.depth("default")).in_flight == 0
    await broker.publish(messages)
    assert await broker.purge("default") == 2
    await broker.stop()

    await user.may(*RIGHTS["both"], *RIGHTS["storage"])
    storage = RedisStorage(user.url)
    await storage.start(user.namespace)
    inbox = await storage.inbox()
    record = Task(
        uuid=str(uuid4()), task_name="tests:task", status="success", reply_to=inbox.address
    )
    inbox.expect([record.uuid])
    assert await storage.save([record]) == [DONE]
    assert await inbox.receive() == [record] == await storage.get([record.uuid])
    await use_all_of(storage, record)
    await storage.stop()


async def test_a_pair_with_the_documented_rights(user: User) -> None:
    await user.may(*RIGHTS["both"], *RIGHTS["broker"], *RIGHTS["storage"])
    broker, storage = RedisBroker(user.url), RedisStorage(user.url)
    await broker.start(user.namespace)
    await storage.start(user.namespace)
    pair = broker.join(storage)
    assert pair is not None
    message = TaskMessage(uuid=str(uuid4()), task_name="tests:task")
    assert await pair.submit([message]) == [DONE]
    subscription = await broker.subscribe({"default": 1})
    (delivery,) = await subscription.receive({"default": 1}, 1)
    end = Task(uuid=message.uuid, task_name="tests:task", status="success")
    assert await pair.complete(subscription, [Completion(Ack(delivery), end)]) == [DONE]
    assert await storage.get([message.uuid]) == [end]
    await broker.stop()
    await storage.stop()


async def use_all_of(storage: RedisStorage, record: Task) -> None:
    """Call the methods that are not on the path of a task."""
    assert (await storage.query(TaskQuery(created_after=0.0))).tasks == [record]
    claim = await storage.claim("key", "owner", 30.0)
    assert claim is not None
    await storage.release(claim)
    assert await storage.set("key", b"value")
    assert await storage.values("k") == {"key": b"value"}
    assert await anext(storage.watch_value("key")) == b"value"
    assert await storage.set("key", None)
    await storage.append(record.uuid, [b"item"])
    assert await storage.read(record.uuid, 0) == [(1, b"item")]
    assert await storage.delete([record.uuid]) == 1
    assert await storage.expire() == 0


@pytest.mark.parametrize("part", ["broker", "storage"])
async def test_each_missing_right_is_named_at_start(user: User, part: str) -> None:
    made = RedisBroker(user.url) if part == "broker" else RedisStorage(user.url)
    rights = [*RIGHTS["both"], *RIGHTS[part]]
    skipped = ("+hello", "+select", "+unsubscribe")  # at connecting, or of no consequence
    for right in rights:
        if right in skipped:
            continue
        await user.may(*(other for other in rights if other != right))
        named = {"~": "on keys", "&": "SUBSCRIBE to qtasks:"}.get(right[0], right[1:].upper())
        with pytest.raises(ConfigurationError, match=rf"docs/rights\.md.*{named}") as told:
            await made.start(user.namespace)
        assert "sesame" not in str(told.value)


async def test_a_push_that_is_refused_fails_no_save(user: User) -> None:
    await user.may("~qtasks:*", "&*", "+@all", "-@dangerous")
    storage = RedisStorage(user.url)
    await storage.start(user.namespace)
    await user.may("~qtasks:*", "resetchannels", "+@all", "-@dangerous")
    record = Task(uuid=str(uuid4()), task_name="tests:task", status="success")
    assert await storage.save([record]) == [DONE]
    assert await storage.get([record.uuid]) == [record]
    await storage.stop()
