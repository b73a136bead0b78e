"""A user needs the rights that docs/postgres.md lists, and no others."""

from __future__ import annotations

import asyncio
import re
from uuid import uuid4

import asyncpg
import pytest

from qtasks_core import Ack, Release, Retry, Task, TaskMessage, TaskQuery
from qtasks_core.errors import ConfigurationError
from qtasks_postgres import PostgresBroker, PostgresStorage
from tests.processes import ROOT

ROW = re.compile(r"^\| (?:the schema )?`([\w.]+)` \| `([A-Z, ]+)` \| (.+) \|$", re.MULTILINE)
RIGHTS = {on: (rights, whose) for on, rights, whose in ROW.findall(
    (ROOT / "docs" / "postgres.md").read_text()
)}  # fmt: skip


async def grant(admin: asyncpg.Connection, user: str, whose: str) -> None:
    for on, (rights, others) in RIGHTS.items():
        if others in ("both", whose):
            kind = "SCHEMA" if on == "qtasks" else "TABLE"
            await admin.execute(f"GRANT {rights} ON {kind} {on} TO {user}")


async def test_the_first_start_needs_the_right_to_create(role: tuple[str, str]) -> None:
    _, url = role
    for part in (PostgresBroker(url), PostgresStorage(url)):
        with pytest.raises(ConfigurationError, match=r"CREATE.*qtasks migrate") as told:
            await part.start("app")
        with pytest.raises(ConfigurationError, match=r"CREATE.*qtasks migrate"):
            await part.migrate("app")
        assert "sesame" not in str(told.value)


async def test_a_broker_with_the_documented_rights(
    fresh: str, admin: asyncpg.Connection, role: tuple[str, str]
) -> None:
    user, url = role
    await PostgresBroker(fresh).migrate("app")
    broker = PostgresBroker(url)
    with pytest.raises(ConfigurationError, match="USAGE on the schema"):
        await broker.start("app")
    await grant(admin, user, "the broker")
    await broker.start("app")
    subscription = await broker.subscribe({"default": 10})
    messages = [TaskMessage(uuid=str(uuid4()), task_name="tests:task") for _ in range(2)]
    await broker.publish(messages)
    async with asyncio.timeout(60):
        one, other = await subscription.receive({"default": 2}, 2)
        await subscription.extend([one, other])
        await subscription.settle([Release(one), Retry(other, messages[0])])
        left = 2
        while left:
            deliveries = await subscription.receive({"default": 2}, 2)
            await subscription.settle([Ack(delivery) for delivery in deliveries])
            left -= len(deliveries)
    await broker.stop()


async def test_a_storage_with_the_documented_rights(
    fresh: str, admin: asyncpg.Connection, role: tuple[str, str]
) -> None:
    user, url = role
    await PostgresStorage(fresh).migrate("app")
    await grant(admin, user, "the storage")
    storage = PostgresStorage(url)
    await storage.start("app")
    inbox = await storage.inbox()
    uuid = str(uuid4())
    await inbox.watch([uuid])
    await storage.save([Task(uuid=uuid, task_name="tests:task", status="success")])
    assert [task.uuid for task in await asyncio.wait_for(inbox.receive(), 60)] == [uuid]
    assert await storage.get([uuid]) != [None]
    assert len((await storage.query(TaskQuery())).tasks) == 1
    assert await storage.set("key", b"1")
    assert await storage.set("key", b"2", expect=b"1")
    assert await storage.values("") == {"key": b"2"}
    claim = await storage.claim("key", "owner", 0.0)
    assert claim is not None
    await storage.release(claim)
    await storage.append(uuid, [b"item"])
    assert await storage.read(uuid, 0) == [(1, b"item")]
    assert await storage.expire() == 0
    assert await storage.delete([uuid]) == 1
    await storage.stop()


@pytest.mark.parametrize(
    ("on", "right"),
    [(on, right) for on, (rights, _) in RIGHTS.items() if on not in ("qtasks", "qtasks.version")
     for right in rights.split(", ")],
)  # fmt: skip
async def test_each_missing_right_is_named(
    fresh: str, admin: asyncpg.Connection, role: tuple[str, str], on: str, right: str
) -> None:
    user, url = role
    await PostgresBroker(fresh).migrate("app")
    whose = RIGHTS[on][1]
    await grant(admin, user, whose)
    await admin.execute(f"REVOKE {right} ON {on} FROM {user}")
    part = PostgresBroker(url) if whose == "the broker" else PostgresStorage(url)
    with pytest.raises(ConfigurationError, match=f"{right} on {on}"):
        await part.start("app")
