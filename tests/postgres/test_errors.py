"""What passes is `Unavailable`, what is final is told once with what to set; nothing comes raw."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from urllib.parse import quote, urlsplit
from uuid import uuid4

import asyncpg
import pytest

from qtasks_core import Ack, Task, TaskMessage
from qtasks_core.errors import ConfigurationError, Unavailable
from qtasks_core.lookup import resolve_broker
from qtasks_postgres import PostgresBroker, PostgresStorage
from tests.services import Service

PATIENCE = 60.0
"""Seconds; only what hangs takes longer."""


def message(**fields: object) -> TaskMessage:
    return TaskMessage(uuid=str(uuid4()), task_name="tests:task", **fields)  # type: ignore[arg-type]


def record(uuid: str, **fields: object) -> Task:
    fields = {"status": "success", **fields}
    return Task(uuid=uuid, task_name="tests:task", **fields)  # type: ignore[arg-type]


@pytest.fixture
async def parts(fresh: str) -> AsyncIterator[tuple[PostgresBroker, PostgresStorage]]:
    broker, storage = PostgresBroker(fresh), PostgresStorage(fresh)
    await broker.start("app")
    await storage.start("app")
    yield broker, storage
    await broker.stop()
    await storage.stop()


@pytest.mark.parametrize("setting", ["lock_timeout", "statement_timeout"])
async def test_a_timeout_of_the_role_passes(
    fresh: str, admin: asyncpg.Connection, setting: str
) -> None:
    database = urlsplit(fresh).path[1:]
    await admin.execute(f"ALTER DATABASE {database} SET {setting} = '200ms'")
    broker, storage = PostgresBroker(fresh), PostgresStorage(fresh)
    await broker.start("app")
    await storage.start("app")
    subscription = await broker.subscribe({"default": 1})
    await broker.publish([message()])
    (delivery,) = await subscription.receive({"default": 1}, 1)
    inbox = await storage.inbox()

    async with admin.transaction():
        await admin.execute("LOCK TABLE qtasks.messages, qtasks.records")
        for call in (
            broker.publish([message()]),
            subscription.receive({"default": 1}, 1),
            subscription.extend([delivery]),
            subscription.settle([Ack(delivery)]),
            storage.save([record("one")]),
            storage.get(["one"]),
            inbox.watch(["one"]),
        ):
            with pytest.raises(Unavailable, match="timeout"):
                await asyncio.wait_for(call, PATIENCE)

    assert [o.status for o in await subscription.settle([Ack(delivery)])] == ["done"]
    assert [o.status for o in await storage.save([record("one")])] == ["done"]
    await broker.stop()
    await storage.stop()


@pytest.mark.parametrize(
    ("code", "final"),
    [
        ("40001", False), ("40P01", False), ("53300", False), ("53100", False), ("55P03", False),
        ("57014", False), ("57P01", False), ("57P03", False), ("58030", False), ("XX000", False),
        ("25006", False), ("26000", False), ("42P05", False), ("22P02", False), ("P0001", False),
        ("23514", False), ("0A000", False), ("99999", False),
        ("42501", True), ("42P01", True), ("42703", True), ("3F000", True),
    ],
)  # fmt: skip
async def test_errors_of_the_server_by_code(
    parts: tuple[PostgresBroker, PostgresStorage],
    admin: asyncpg.Connection,
    code: str,
    final: bool,
) -> None:
    """The server itself raises each, in a trigger on the tables."""
    broker, storage = parts
    await admin.execute(
        "CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        f" RAISE EXCEPTION 'no luck today' USING ERRCODE = '{code}', DETAIL = 'hidden'; END $$;"
        "CREATE TRIGGER fail BEFORE INSERT ON qtasks.messages EXECUTE FUNCTION fail();"
        "CREATE TRIGGER fail BEFORE INSERT ON qtasks.records EXECUTE FUNCTION fail();"
    )
    for call in (broker.publish([message()]), storage.save([record("one")])):
        with pytest.raises(ConfigurationError if final else Unavailable, match="no luck") as told:
            await call
        assert "hidden" not in str(told.value)
        assert "\n" not in str(told.value)
    await admin.execute("DROP FUNCTION fail CASCADE")
    assert [o.status for o in await broker.publish([message()])] == ["done"]
    assert [o.status for o in await storage.save([record("one")])] == ["done"]


async def test_errors_in_the_callers_transaction(
    parts: tuple[PostgresBroker, PostgresStorage], fresh: str
) -> None:
    broker, storage = parts
    connection = await asyncpg.connect(fresh)
    transaction = connection.transaction()
    await transaction.start()
    with pytest.raises(asyncpg.UndefinedTableError):
        await connection.execute("SELECT * FROM nowhere")
    with pytest.raises(Unavailable, match="aborted"):
        await broker.publish([message()], transaction=connection)
    await transaction.rollback()
    await connection.close()
    with pytest.raises(Unavailable, match="closed"):
        await storage.save([record("one")], transaction=connection)


async def test_too_many_connections_pass(
    fresh: str, admin: asyncpg.Connection, role: tuple[str, str]
) -> None:
    user, url = role
    await admin.execute(f"GRANT CREATE ON DATABASE {urlsplit(fresh).path[1:]} TO {user}")
    await admin.execute(f"ALTER ROLE {user} CONNECTION LIMIT 0")
    broker = PostgresBroker(url)
    with pytest.raises(Unavailable, match="too many connections"):
        await broker.start("app")
    await admin.execute(f"ALTER ROLE {user} CONNECTION LIMIT -1")
    await broker.start("app")
    await broker.stop()


async def test_a_server_that_became_read_only_is_left(
    parts: tuple[PostgresBroker, PostgresStorage], fresh: str, admin: asyncpg.Connection
) -> None:
    """As when a name leads to another server: the old one refuses writes on connections it has."""
    broker, storage = parts
    subscription, inbox = await broker.subscribe({"default": 1}), await storage.inbox()
    expected = str(uuid4())
    inbox.expect([expected])
    await asyncio.gather(*(broker.publish([message(queue="other")]) for _ in range(8)))
    old = await pids(admin)
    database = urlsplit(fresh).path[1:]
    # For new sessions; those that are there are told one by one.
    await admin.execute(f"ALTER DATABASE {database} SET default_transaction_read_only = on")
    with pytest.raises(Unavailable, match="read-only"):
        await PostgresBroker(fresh).start("app")
    # A session takes new defaults of a superuser's only from the configuration.
    await admin.execute("ALTER SYSTEM SET default_transaction_read_only = on")
    await admin.execute("SELECT pg_reload_conf()")
    try:
        with pytest.raises(Unavailable, match="read-only"):
            await asyncio.wait_for(subscription.receive({"default": 1}, 1), PATIENCE)
        with pytest.raises(Unavailable, match="read-only"):
            await asyncio.wait_for(inbox.receive(), PATIENCE)
        with pytest.raises(Unavailable, match="read-only"):
            await storage.save([record("one")])
        with pytest.raises(Unavailable, match="read-only"):
            await broker.publish([message()])
        await until(lambda: gone(admin, old))
    finally:
        async with asyncio.timeout(PATIENCE):
            await admin.execute("SET transaction_read_only = off")
            await admin.execute("SET default_transaction_read_only = off")
            await admin.execute("ALTER SYSTEM RESET default_transaction_read_only")
            await admin.execute(f"ALTER DATABASE {database} RESET default_transaction_read_only")
            await admin.execute("SELECT pg_reload_conf()")
    other = await asyncpg.connect(fresh)
    await until(lambda: writable(other))
    await other.close()
    await broker.publish([message()])
    assert await asyncio.wait_for(subscription.receive({"default": 1}, 1), PATIENCE)
    receiving = asyncio.create_task(inbox.receive())
    await storage.save([record(expected, reply_to=inbox.address)])
    assert {task.uuid for task in await asyncio.wait_for(receiving, PATIENCE)} == {expected}


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    """Ask until it is so: nothing tells."""
    async with asyncio.timeout(PATIENCE):
        while not await condition():  # noqa: ASYNC110  it is the server's matter
            await asyncio.sleep(0.01)


async def gone(admin: asyncpg.Connection, old: set[int]) -> bool:
    """Tell whether none of the processes serves QTasks any more."""
    return not await pids(admin) & old


async def writable(connection: asyncpg.Connection) -> bool:
    """Tell whether the connection may write by default."""
    shown: str = await connection.fetchval("SHOW default_transaction_read_only")
    return shown == "off"


async def pids(admin: asyncpg.Connection) -> set[int]:
    """Return the server's processes that serve QTasks in this database."""
    rows = await admin.fetch(
        "SELECT pid FROM pg_stat_activity"
        " WHERE application_name = 'qtasks' AND datname = current_database()"
    )
    return {row["pid"] for row in rows}


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("sslmode=verify-full", "root certificate"),
        ("sslmode=require", "sslmode=disable"),
        ("sslmode=maybe", "sslmode"),
        ("sslrootcert=/nowhere/ca.pem&sslmode=verify-ca", "sslrootcert=/nowhere/ca.pem"),
        ("sslcert=/nowhere/me.pem", "sslcert=/nowhere/me.pem"),
        ("sslmode=verify-ca&sslrootcert={junk}", "sslrootcert"),
        ("ssl=require", "sslmode=require"),
        ("keepalives_idle=10", "leave it out"),
        ("channel_binding=require", "leave it out"),
        ("target_session_attrs=best", "target_session_attrs"),
        ("connect_timeout=soon", "connect_timeout"),
        ("passfile=/nowhere/pass", "passfile"),
        ("options=-c%20flavour%3Dmint", "flavour"),
        ("lease=soon", "lease"),
    ],
)
async def test_options_that_are_wrong_are_told_at_once(
    postgres_server: Service, tmp_path_factory: pytest.TempPathFactory, query: str, said: str
) -> None:
    junk = tmp_path_factory.mktemp("tls") / "junk.pem"
    junk.write_text("no certificate")
    query = query.format(junk=quote(str(junk), safe=""))
    url = urlsplit(postgres_server.url)._replace(query=query).geturl()
    with pytest.raises(ConfigurationError) as told:
        await resolve_broker(url).start("app")
    assert said in str(told.value)
    assert str(urlsplit(postgres_server.url).password) not in str(told.value)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    "query",
    [
        "sslmode=disable", "sslmode=prefer", "application_name=mine", "connect_timeout=4",
        "connect_timeout=0", "target_session_attrs=read-write", "options=-c%20work_mem%3D8MB",
        "statement_timeout=20000",
    ],
)  # fmt: skip
async def test_options_of_libpq_hold(postgres_server: Service, query: str) -> None:
    url = urlsplit(postgres_server.url)._replace(query=query).geturl()
    broker = resolve_broker(url)
    await broker.start(str(uuid4()))
    subscription = await broker.subscribe({"default": 1})
    await broker.publish([message()])
    assert await subscription.receive({"default": 1}, 1)
    connection = await asyncpg.connect(postgres_server.url)
    names = {r[0] for r in await connection.fetch("SELECT application_name FROM pg_stat_activity")}
    assert ("mine" in names) == ("mine" in query)
    await connection.close()
    await broker.stop()


async def test_several_hosts(postgres_server: Service) -> None:
    """Those that are away or cannot be written to are passed over."""
    parts = urlsplit(postgres_server.url)
    own = f"{parts.hostname}:{parts.port}"
    url = parts._replace(netloc=f"{parts.username}:{parts.password}@127.0.0.1:9,{own}").geturl()
    broker = PostgresBroker(url)
    await broker.start(str(uuid4()))
    assert [o.status for o in await broker.publish([message()])] == ["done"]
    await broker.stop()


@pytest.mark.parametrize("scheme", ["postgresql+asyncpg", "postgres+psycopg2"])
def test_a_scheme_of_others_is_answered_with_the_right_one(scheme: str) -> None:
    with pytest.raises(ConfigurationError, match=r"write postgres(ql)?://") as told:
        resolve_broker(f"{scheme}://me:sesame@localhost/app")
    assert "sesame" not in str(told.value)
    with pytest.raises(ConfigurationError, match="write postgresql://"):
        PostgresBroker(f"{scheme}://me:sesame@localhost/app")


async def test_a_server_that_dies_while_it_refuses_tls_is_away() -> None:
    """Its last words come with its answer, and the driver says "rejected SSL upgrade"."""

    async def die(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(8)
        server.close()
        writer.write(b"NE\0\0\0\5\0")
        writer.close()

    server = await asyncio.start_server(die, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    storage = PostgresStorage(f"postgresql://me:hunter2@127.0.0.1:{port}/app")
    with pytest.raises(Unavailable):
        await storage.start("app")
    await storage.stop()
