"""Behind PgBouncer, with the settings it comes with."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote, urlsplit
from uuid import uuid4

import pytest

from qtasks_core import Ack, Task, TaskMessage
from qtasks_core.errors import ConfigurationError
from qtasks_core.lookup import resolve_broker, resolve_storage
from qtasks_postgres import PostgresBroker
from tests.processes import ROOT
from tests.services import Service
from tests.services.pgbouncer import bouncing

PATIENCE = 60.0


@pytest.fixture(scope="module")
def transactions(postgres_server: Service) -> Iterator[str]:
    with bouncing(postgres_server.url, "transaction") as url:
        yield url


@pytest.fixture(scope="module")
def sessions(postgres_server: Service) -> Iterator[str]:
    with bouncing(postgres_server.url, "session") as url:
        yield url


async def work(url: str) -> None:
    """Send tasks through both halves, from many callers, and wait for their records."""
    namespace = str(uuid4())
    broker, storage = resolve_broker(url), resolve_storage(url)
    await broker.start(namespace)
    await storage.start(namespace)
    subscription, inbox = await broker.subscribe({"default": 100}), await storage.inbox()
    sent = [TaskMessage(uuid=str(uuid4()), task_name="tests:task") for _ in range(40)]
    inbox.expect([message.uuid for message in sent])
    received: set[str] = set()
    told: set[str] = set()

    async def receive() -> None:
        while len(received) < len(sent):
            deliveries = await subscription.receive({"default": 10}, 10)
            records = [
                Task(
                    uuid=delivery.message.uuid, task_name="tests:task", status="success",
                    reply_to=inbox.address,
                )
                for delivery in deliveries
                if isinstance(delivery.message, TaskMessage)
            ]  # fmt: skip
            assert None not in await subscription.extend(deliveries)
            assert {o.status for o in await storage.save(records)} == {"done"}
            outcomes = await subscription.settle([Ack(delivery) for delivery in deliveries])
            assert {o.status for o in outcomes} == {"done"}
            received.update(record.uuid for record in records)

    async def listen() -> None:
        while len(told) < len(sent):
            told.update(task.uuid for task in await inbox.receive())

    async with asyncio.timeout(PATIENCE), asyncio.TaskGroup() as group:
        group.create_task(receive())
        group.create_task(listen())
        for message in sent:
            group.create_task(broker.publish([message]))
    assert received == told == {message.uuid for message in sent}
    await broker.stop()
    await storage.stop()


async def test_session_mode_works(sessions: str) -> None:
    await work(sessions)


async def test_transaction_mode_works_with_a_way_around_it(
    transactions: str, postgres_server: Service
) -> None:
    await work(f"{transactions}?listen_url={quote(postgres_server.url, safe='')}")


async def test_the_way_around_it_as_documented(transactions: str, postgres_server: Service) -> None:
    page = (ROOT / "docs" / "postgres.md").read_text()
    block = page.split("```python\n")[1].split("```")[0]
    block = re.sub('pooler = ".*"', f'pooler = "{transactions}"', block)
    block = re.sub('direct = ".*"', f'direct = "{postgres_server.url}"', block)
    names: dict[str, Any] = {}
    exec(block, names)  # noqa: S102  it is our own page
    await names["broker"].start("app")
    await names["storage"].start("app")
    await names["broker"].stop()
    await names["storage"].stop()


async def test_transaction_mode_alone_is_refused_in_one_line(transactions: str) -> None:
    with pytest.raises(ConfigurationError, match=r"transaction mode.*listen_url=") as told:
        await resolve_broker(transactions).start("app")
    assert "\n" not in str(told.value)
    with pytest.raises(ConfigurationError, match=r"transaction mode.*listen_url="):
        await resolve_storage(transactions).start("app")


async def test_a_way_around_that_leads_elsewhere_is_refused(
    transactions: str, postgres_server: Service, fresh: str
) -> None:
    with pytest.raises(ConfigurationError, match="listen_url="):
        await PostgresBroker(transactions, listen_url=fresh).start("app")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"query": "statement_timeout=100"}, "ignore_startup_parameters"),
        ({"query": "options=-c%20work_mem%3D8MB"}, "ignore_startup_parameters"),
        ({"password": "wrong"}, "password"),
    ],
)
async def test_what_the_pooler_refuses_is_told(
    sessions: str, change: dict[str, str], said: str
) -> None:
    parts = urlsplit(sessions)
    if "password" in change:
        parts = parts._replace(netloc=f"postgres:wrong@{parts.hostname}:{parts.port}")
    url = parts._replace(query=change.get("query", "")).geturl()
    with pytest.raises(ConfigurationError, match=said) as told:
        await PostgresBroker(url).start("app")
    assert str(urlsplit(sessions).password) not in str(told.value)


async def test_the_password_of_a_way_around_is_never_shown() -> None:
    around = quote("postgresql://me:sesame@other/app", safe="")
    with pytest.raises(ConfigurationError) as told:
        resolve_broker(f"postgresql://host/app?lease=soon&listen_url={around}")
    assert "sesame" not in str(told.value)
