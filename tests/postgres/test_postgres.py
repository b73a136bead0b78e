"""What is Postgres's own: the schema, plans, transactions, notifications, a server that freezes."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import suppress
from urllib.parse import urlsplit
from uuid import uuid4

import asyncpg
import pytest

from qtasks_core import Ack, Task, TaskMessage
from qtasks_core.errors import ConfigurationError, Unavailable
from qtasks_postgres import (
    PostgresBackend,
    PostgresBroker,
    PostgresStorage,
    floors,
    storage,
    subscription,
)
from qtasks_postgres.connection import SETTINGS
from qtasks_postgres.schema import ensure_schema
from tests.services import Service


def message(**fields: object) -> TaskMessage:
    return TaskMessage(uuid=str(uuid4()), task_name="tests:task", **fields)  # type: ignore[arg-type]


def record(uuid: str, **fields: object) -> Task:
    fields = {"status": "success", **fields}
    return Task(uuid=uuid, task_name="tests:task", **fields)  # type: ignore[arg-type]


@pytest.fixture
async def parts(postgres_server: Service) -> AsyncIterator[tuple[PostgresBroker, PostgresStorage]]:
    namespace = str(uuid4())
    broker = PostgresBackend().broker(f"{postgres_server.url}?lease=30")
    storage = PostgresBackend().storage(f"{postgres_server.url}?lease=30")
    await broker.start(namespace)
    await storage.start(namespace)
    yield broker, storage
    await broker.stop()
    await storage.stop()


async def test_first_starts_side_by_side(fresh: str) -> None:
    starting = [PostgresBroker(fresh) for _ in range(8)]
    await asyncio.gather(*(part.start(str(at)) for at, part in enumerate(starting)))
    await asyncio.gather(*(part.publish([message()]) for part in starting))
    for part in starting:
        await part.stop()


async def test_a_newer_schema_is_refused(fresh: str) -> None:
    part = PostgresStorage(fresh)
    await part.start("app")
    await part.stop()
    connection = await asyncpg.connect(fresh)
    await connection.execute("UPDATE qtasks.version SET version = version + 1")
    await connection.close()
    with pytest.raises(ConfigurationError, match="upgrade qtasks"):
        await part.start("app")


@pytest.mark.parametrize(
    ("change", "word"),
    [({"netloc": "postgres:sesame@{host}"}, "password"), ({"path": "/nowhere"}, "database")],
)
async def test_wrong_credentials_are_told(
    postgres_server: Service, change: dict[str, str], word: str
) -> None:
    parts = urlsplit(postgres_server.url)
    host = f"{parts.hostname}:{parts.port}"
    url = parts._replace(**{k: v.format(host=host) for k, v in change.items()}).geturl()
    with pytest.raises(ConfigurationError, match=word) as told:
        await PostgresBroker(url).start("app")
    assert "sesame" not in str(told.value)
    assert str(parts.password) not in str(told.value)


@pytest.mark.parametrize("options", ["flavour=mint", "port=5432&port", "statement_timeout=soon"])
async def test_wrong_options_are_told(postgres_server: Service, options: str) -> None:
    parts = urlsplit(postgres_server.url)._replace(query=options)
    with pytest.raises(ConfigurationError, match=options.partition("=")[0]) as told:
        await PostgresBroker(parts.geturl()).start("app")
    assert str(parts.password) not in str(told.value)


async def test_plans_made_on_an_empty_table_use_whole_indexes(fresh: str) -> None:
    """A cached plan must not begin with all rows of a table that was empty when it was made."""
    connection = await asyncpg.connect(fresh, server_settings=SETTINGS)
    await ensure_schema(connection)
    await connection.execute("VACUUM ANALYZE qtasks.messages, qtasks.records")
    await connection.execute("SET plan_cache_mode = force_generic_plan")
    statements = {
        "TAKE": subscription.TAKE, "LOOK": subscription.LOOK, "LIVING": floors.LIVING,
        "NEXT": subscription.NEXT, "ACK": subscription.ACK,
        "RETRY": subscription.RETRY, "RELEASE": subscription.RELEASE, "EXTEND": subscription.EXTEND,
        "GET": storage.GET,
    }  # fmt: skip
    for name, statement in statements.items():
        await connection.execute(f"PREPARE {name} AS {statement}")
        count = await connection.fetchval(
            "SELECT cardinality(parameter_types) FROM pg_prepared_statements WHERE name = $1",
            name.lower(),
        )
        nulls = ", ".join(["NULL"] * count)
        plan = [row[0] for row in await connection.fetch(f"EXPLAIN EXECUTE {name} ({nulls})")]
        for at, line in enumerate(plan):
            assert "Seq Scan" not in line, "\n".join(plan)
            if "Scan using" in line:
                assert "Index Cond" in plan[at + 1], "\n".join(plan)
                assert "uuid" in plan[at + 1] or "records" not in line, "\n".join(plan)
    await connection.close()


async def test_a_transaction_of_the_callers(
    parts: tuple[PostgresBroker, PostgresStorage], postgres_server: Service
) -> None:
    broker, storage = parts
    subscription = await broker.subscribe({"default": 10})
    receiving = asyncio.create_task(subscription.receive({"default": 10}, 10))
    connection = await asyncpg.connect(postgres_server.url)

    undone = connection.transaction()
    await undone.start()
    await broker.publish([message()], transaction=connection)
    await undone.rollback()

    kept = message()
    async with connection.transaction():
        await broker.publish([kept], transaction=connection)
        await storage.save([record(kept.uuid, status="new")], transaction=connection)
        await asyncio.sleep(0.2)
        assert not receiving.done()
        assert await storage.get([kept.uuid]) == [None]
    # Well before the receiver would look for itself.
    deliveries = await asyncio.wait_for(receiving, 1.5)
    assert [delivery.message for delivery in deliveries] == [kept]
    assert await storage.get([kept.uuid]) != [None]
    await connection.close()

    with pytest.raises(ConfigurationError, match="a connection of asyncpg"):
        await broker.publish([kept], transaction=object())


@pytest.mark.parametrize("size", [0, 5_600, 5_700, 5_800, 5_900, 8_000, 3_000_000])
async def test_records_of_any_size_are_pushed(
    parts: tuple[PostgresBroker, PostgresStorage], size: int
) -> None:
    _, storage = parts
    inbox = await storage.inbox()
    final = record(str(uuid4()), returning=os.urandom(size), reply_to=inbox.address)
    inbox.expect([final.uuid])
    receiving = asyncio.create_task(inbox.receive())
    await storage.save([final])
    assert await asyncio.wait_for(receiving, 2) == [final]


async def test_text_that_postgres_cannot_keep_harms_no_neighbour(
    parts: tuple[PostgresBroker, PostgresStorage],
) -> None:
    _, storage = parts
    odd = Task(
        uuid=f"{uuid4()}\0", task_name="a\0b", status="success", execution="\0", attempt=2**60,
        created_at=float("inf"), reply_to="not an address" * 10,
    )  # fmt: skip
    plain = record(str(uuid4()))
    assert [o.status for o in await storage.save([odd, plain])] == ["done", "done"]
    assert await storage.get([odd.uuid, plain.uuid]) == [odd, plain]


async def test_cancelled_calls_keep_their_connections(
    parts: tuple[PostgresBroker, PostgresStorage], postgres_server: Service
) -> None:
    broker, _ = parts
    before = await backends(postgres_server.url)
    for at in range(60):
        publishing = asyncio.create_task(broker.publish([message()]))
        await asyncio.sleep(at % 10 / 4000)
        publishing.cancel()
        await asyncio.wait({publishing})
    assert await backends(postgres_server.url) <= before + 4
    assert [outcome.status for outcome in await broker.publish([message()])] == ["done"]


async def backends(url: str) -> int:
    """Return how many connections of qtasks the server has."""
    connection = await asyncpg.connect(url)
    count: int = await connection.fetchval(
        "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'qtasks'"
    )
    await connection.close()
    return count


async def test_connections_cut_by_the_server_come_back(
    parts: tuple[PostgresBroker, PostgresStorage], postgres_server: Service
) -> None:
    """The server's farewell may reach an idle connection just before it is used."""
    broker, storage = parts
    subscription = await broker.subscribe({"default": 100})
    cutter = await asyncpg.connect(postgres_server.url)
    sent: set[str] = set()
    received: set[str] = set()
    for _ in range(30):
        cutting = asyncio.create_task(
            cutter.fetch(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE application_name = 'qtasks'"
            )
        )
        for _ in range(4):
            sending = message()
            with suppress(Unavailable):
                await broker.publish([sending])
                sent.add(sending.uuid)
            with suppress(Unavailable):
                await storage.save([record(sending.uuid)])
        await cutting
    await cutter.close()
    async with asyncio.timeout(120):
        while not sent <= received:
            with suppress(Unavailable):
                for delivery in await subscription.receive({"default": 100}, 100):
                    assert isinstance(delivery.message, TaskMessage)
                    received.add(delivery.message.uuid)


async def unavailable_after(call: Awaitable[object]) -> float:
    """Return the seconds after which a call gave up."""
    begun = time.monotonic()
    with pytest.raises(Unavailable):
        await call
    return time.monotonic() - begun


async def test_a_frozen_server_is_noticed_by_all_who_wait(
    parts: tuple[PostgresBroker, PostgresStorage], postgres_server: Service
) -> None:
    broker, storage = parts
    subscription = await broker.subscribe({"default": 10, "other": 10})
    inbox = await storage.inbox()
    late = str(uuid4())
    inbox.expect([late])
    await broker.publish([message()])
    deliveries = await subscription.receive({"default": 1}, 1)
    receiving = asyncio.create_task(unavailable_after(subscription.receive({"other": 1}, 1)))
    listening = asyncio.create_task(unavailable_after(inbox.receive()))
    await asyncio.sleep(0.2)

    await asyncio.to_thread(postgres_server.freeze)
    try:
        calls = (
            broker.publish([message()]),
            subscription.settle([Ack(deliveries[0])]),
            subscription.extend(deliveries),
            storage.save([record(late)]),
            storage.get([late]),
            inbox.watch([str(uuid4())]),
        )
        waited = await asyncio.gather(*map(unavailable_after, calls))
        assert max(waited) < 7
        assert max(await receiving, await listening) < 10
    finally:
        await asyncio.to_thread(postgres_server.thaw)

    await storage.save([record(late)])
    assert [task.uuid for task in await asyncio.wait_for(inbox.receive(), 3)] == [late]
    await broker.publish([message(queue="other")])
    assert await asyncio.wait_for(subscription.receive({"other": 1}, 1), 3)
