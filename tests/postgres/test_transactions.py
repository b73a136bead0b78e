"""Enqueuing in the caller's transaction: all of it at the commit, nothing after a rollback."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from pathlib import Path
from typing import Any, cast

import asyncpg
import psycopg
import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine

from qtasks import SyncRouter, control
from qtasks.asyncio import QueueTasks
from qtasks_core import TaskQuery
from qtasks_core.errors import ConfigurationError, NotSupported, Unavailable
from qtasks_postgres import PostgresBroker
from tests.docs.test_code_blocks import blocks_of
from tests.processes import ROOT

PAGE = ROOT / "docs" / "postgres.md"
Begin = Callable[[str], AbstractAsyncContextManager[Any]]


@asynccontextmanager
async def plain(url: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(url)
    try:
        async with connection.transaction():
            yield connection
    finally:
        await connection.close()


@asynccontextmanager
async def pooled(url: str) -> AsyncIterator[Any]:
    async with (
        asyncpg.create_pool(url, min_size=1, max_size=1) as pool,
        pool.acquire() as connection,
        connection.transaction(),
    ):
        yield connection


@asynccontextmanager
async def of_psycopg(url: str) -> AsyncIterator[psycopg.AsyncConnection]:
    """A transaction that psycopg begins with the first statement."""
    async with await psycopg.AsyncConnection.connect(url) as connection:
        yield connection


@asynccontextmanager
async def of_psycopg_with_autocommit(url: str) -> AsyncIterator[psycopg.AsyncConnection]:
    async with (
        await psycopg.AsyncConnection.connect(url, autocommit=True) as connection,
        connection.transaction(),
    ):
        yield connection


@asynccontextmanager
async def engine_of(url: str, driver: str = "asyncpg") -> AsyncIterator[AsyncEngine]:
    engine = create_async_engine(url.replace("postgresql://", f"postgresql+{driver}://"))
    try:
        yield engine
    finally:
        await engine.dispose()


@asynccontextmanager
async def session(url: str) -> AsyncIterator[AsyncSession]:
    async with engine_of(url) as engine, AsyncSession(engine) as session, session.begin():
        yield session


@asynccontextmanager
async def connection_of_sqlalchemy(url: str) -> AsyncIterator[Any]:
    async with engine_of(url) as engine, engine.begin() as connection:
        yield connection


@asynccontextmanager
async def session_on_psycopg(url: str) -> AsyncIterator[AsyncSession]:
    async with (
        engine_of(url, "psycopg") as engine,
        AsyncSession(engine) as session,
        session.begin(),
    ):
        yield session


class Undo(Exception):
    """Rolls the caller's transaction back."""


async def add(x: int, y: int) -> int:
    return x + y


@pytest.fixture
async def app(fresh: str) -> AsyncIterator[QueueTasks]:
    app = QueueTasks("shop", fresh)
    async with app:
        yield app


async def listed(app: QueueTasks) -> list[str]:
    page = await app.control(control.query, TaskQuery())
    return [task.uuid for task in page.tasks]


@pytest.mark.parametrize(
    "begin",
    [
        plain,
        pooled,
        of_psycopg,
        of_psycopg_with_autocommit,
        session,
        session_on_psycopg,
        connection_of_sqlalchemy,
    ],
)
async def test_tasks_are_those_of_committed_transactions(
    begin: Begin, fresh: str, app: QueueTasks, admin: asyncpg.Connection
) -> None:
    task = app.task(name="add")(add)
    with suppress(Undo):
        async with begin(fresh) as transaction:
            await task.add_task(1, 2, transaction=transaction)
            raise Undo
    counts = "SELECT (SELECT count(*) FROM qtasks.messages) + (SELECT count(*) FROM qtasks.records)"
    assert await admin.fetchval(counts) == 0
    async with app.worker():
        async with begin(fresh) as transaction:
            one = await task.add_task(1, 2, transaction=transaction)
            two = await task.call(3, 4).add_task(transaction=transaction, expires=60)
            more = await app.add_tasks([task.call(5, 6), task.call(7, 8)], transaction=transaction)
            most = await task.map([(9, 10)], transaction=transaction)
            assert one.status == "new"
            await asyncio.sleep(0.3)
            assert await admin.fetchval(counts) == 0
            waiting = [
                asyncio.create_task(each.wait_result(120)) for each in (one, two, *more, *most)
            ]
        # Well before a worker would look for itself.
        async with asyncio.timeout(2):
            assert [(await each).returning for each in waiting] == [3, 7, 11, 15, 19]


@pytest.mark.parametrize("begin", [plain, of_psycopg])
async def test_a_key_is_taken_at_the_commit(begin: Begin, fresh: str, app: QueueTasks) -> None:
    task = app.task(name="add")(add)
    with suppress(Undo):
        async with begin(fresh) as transaction:
            await task.add_task(1, 2, key="order 7", transaction=transaction)
            raise Undo
    async with begin(fresh) as transaction:
        first = await task.add_task(3, 4, key="order 7", transaction=transaction)
        again = await task.add_task(5, 6, key="order 7", transaction=transaction)
        assert again.uuid == first.uuid
        assert again.args == first.args
    other = await task.add_task(7, 8, key="order 7")
    assert (other.uuid, other.args) == (first.uuid, first.args)
    async with app.worker():
        assert (await first.wait_result(120)).returning == 7
    async with plain(fresh) as transaction:
        late = await task.add_task(1, 1, key="order 7", transaction=transaction)
        assert late.returning == 7


async def test_the_rows_of_the_caller_and_the_task_are_one_transaction(
    fresh: str, app: QueueTasks, admin: asyncpg.Connection
) -> None:
    await admin.execute("CREATE TABLE orders (id integer PRIMARY KEY)")
    task = app.task(name="add")(add)
    async with session(fresh) as transaction:
        await transaction.execute(text("INSERT INTO orders VALUES (7)"))
        kept = await task.add_task(1, 2, transaction=transaction)
        with suppress(Undo):
            async with transaction.begin_nested():
                await task.add_task(3, 4, transaction=transaction)
                raise Undo
    assert await admin.fetchval("SELECT count(*) FROM orders") == 1
    assert await listed(app) == [kept.uuid]


async def test_what_is_no_transaction_is_refused(fresh: str, app: QueueTasks) -> None:
    task = app.task(name="add")(add)
    with pytest.raises(ConfigurationError, match="connection of asyncpg, an AsyncConnection of"):
        await task.add_task(1, 2, transaction=object())
    connection = await asyncpg.connect(fresh)
    with pytest.raises(ConfigurationError, match="no open transaction"):
        await task.add_task(1, 2, transaction=connection)
    await connection.close()
    async with await psycopg.AsyncConnection.connect(fresh, autocommit=True) as own:
        with pytest.raises(ConfigurationError, match="no open transaction"):
            await task.add_task(1, 2, transaction=own)
    with pytest.raises(Unavailable, match="closed"):
        await task.add_task(1, 2, transaction=own)
    with psycopg.connect(fresh) as blocking_one:  # noqa: SIM117
        with pytest.raises(ConfigurationError, match=r"not a psycopg\.Connection"):
            await task.add_task(1, 2, transaction=blocking_one)
    async with engine_of(fresh) as engine:
        automatic = engine.execution_options(isolation_level="AUTOCOMMIT")
        async with automatic.connect() as each:
            with pytest.raises(ConfigurationError, match="AUTOCOMMIT"):
                await task.add_task(1, 2, transaction=each)
    async with plain(fresh) as transaction:
        with pytest.raises(ConfigurationError, match="exclude each other"):
            await task.add_task(1, 2, transaction=transaction, timeout=5)
        router = SyncRouter()
        app.include_router(router)
        blocking = router.task(name="blocking")(lambda: None)
        with pytest.raises(ConfigurationError, match="async code"):
            blocking.add_task(transaction=transaction)
    assert await listed(app) == []


async def test_what_the_server_says_to_psycopg_is_told(
    fresh: str, app: QueueTasks, admin: asyncpg.Connection
) -> None:
    task = app.task(name="add")(add)
    async with await psycopg.AsyncConnection.connect(fresh) as transaction:
        with suppress(psycopg.Error):
            await transaction.execute("SELECT 1 / 0")
        with pytest.raises(Unavailable, match="transaction=: current transaction is aborted"):
            await task.add_task(1, 2, transaction=transaction)
        await transaction.rollback()
        await admin.execute("DROP SCHEMA qtasks CASCADE")
        with pytest.raises(ConfigurationError, match="the schema qtasks was removed"):
            await task.add_task(1, 2, transaction=transaction)


async def test_other_pairs_refuse_and_write_nothing(fresh: str, tmp_path: Path) -> None:
    sqlite = f"sqlite:///{tmp_path}/qtasks.db"
    elsewhere = PostgresBroker(fresh, schema="elsewhere")
    for broker, storage in ((sqlite, None), (sqlite, fresh), (fresh, sqlite), (elsewhere, fresh)):
        app = QueueTasks("shop", broker, storage)
        task = app.task(name="add")(add)
        async with app, plain(fresh) as transaction:
            with pytest.raises(NotSupported, match="PostgresBroker with PostgresStorage"):
                await task.add_task(1, 2, transaction=transaction)
            with pytest.raises(NotSupported, match="PostgresBroker with PostgresStorage"):
                await app.add_tasks([task.call(1, 2)], transaction=cast("object", transaction))
            assert await listed(app) == []
            depths = await app.control(control.depths, ["default"])
            assert depths["default"].ready == 0


async def test_the_example_of_the_page(
    fresh: str, app: QueueTasks, admin: asyncpg.Connection
) -> None:
    (block,) = [block for block in blocks_of(PAGE) if "place_order" in block.code]
    await admin.execute("CREATE TABLE orders (number integer)")

    @app.task(name="send_receipt")
    async def send_receipt(number: int) -> int:
        return number

    names: dict[str, Any] = {"send_receipt": send_receipt}
    exec(block.code, names)  # noqa: S102  # the page's own code
    await names["place_order"](admin, 7)
    assert await admin.fetchval("SELECT number FROM orders") == 7
    assert len(await listed(app)) == 1
