"""While a transaction holds a snapshot for hours nothing is vacuumed; tasks cost what they did."""

from __future__ import annotations

import asyncio
import time
from statistics import median
from uuid import uuid4

import asyncpg
import pytest

from qtasks_core import Ack, Release, Task, TaskMessage
from qtasks_postgres import PostgresBroker, PostgresStorage

TASKS = 40
PATIENCE = 60.0

# As receivers leave them: published, leased, gone; some were delayed, given back or lost.
DIE = (
    """
    INSERT INTO qtasks.messages (namespace, queue, priority, body, wake_at)
    SELECT $1, 'default', 5 + at % 2, '\\x00',
           CASE WHEN at % 10 = 0 THEN clock_timestamp() END
    FROM generate_series(1, $2::int) AS many (at)
    """,
    """
    UPDATE qtasks.messages
    SET delivery = 1, wake_at = clock_timestamp() - random() * interval '1 hour'
    WHERE namespace = $1
    """,
    "DELETE FROM qtasks.messages WHERE namespace = $1",
)

# The blocks that statements have read of tables and their indexes, wherever they were found.
BLOCKS = """
    SELECT sum(heap_blks_read + heap_blks_hit + idx_blks_read + idx_blks_hit)::bigint
    FROM pg_statio_user_tables WHERE schemaname = 'qtasks'
"""


@pytest.fixture
async def snapshot(fresh: str, admin: asyncpg.Connection) -> None:
    """Hold one until the admin's connection is closed."""
    broker = PostgresBroker(fresh)
    await broker.start("app")  # so that there are tables to look at
    await broker.stop()
    await hold(admin)


async def hold(admin: asyncpg.Connection) -> None:
    # Vacuum, which could remove nothing, would be counted with the reads.
    await admin.execute("ALTER TABLE qtasks.messages SET (autovacuum_enabled = off)")
    await admin.execute("ALTER TABLE qtasks.records SET (autovacuum_enabled = off)")
    await admin.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
    await admin.fetch("SELECT count(*) FROM qtasks.messages")


async def die(url: str, namespace: str, count: int) -> None:
    """Leave dead rows of as many messages."""
    connection = await asyncpg.connect(url)
    await connection.execute(DIE[0], namespace, count)
    for statement in DIE[1:]:
        await connection.execute(statement, namespace)
    await connection.close()


def message(**fields: object) -> TaskMessage:
    return TaskMessage(uuid=str(uuid4()), task_name="tests:task", **fields)  # type: ignore[arg-type]


async def work(url: str, namespace: str, tasks: int = TASKS) -> float:
    """Use each statement for some tasks; return the median of their seconds."""
    broker, storage = PostgresBroker(url), PostgresStorage(url)
    await broker.start(namespace)
    await storage.start(namespace)
    subscription, inbox = await broker.subscribe({"default": 10}), await storage.inbox()
    took = []
    for _ in range(tasks):
        begun = time.perf_counter()
        sent = message()
        await storage.save([Task(uuid=sent.uuid, task_name=sent.task_name, status="new")])
        await broker.publish([sent])
        (delivery,) = await subscription.receive({"default": 1}, 1)
        assert await subscription.extend([delivery]) == [delivery]
        await subscription.settle([Release(delivery)])
        (delivery,) = await subscription.receive({"default": 1}, 1)
        await storage.get([sent.uuid])
        final = Task(
            uuid=sent.uuid, task_name=sent.task_name, status="success", reply_to=inbox.address
        )
        inbox.expect([sent.uuid])
        await storage.save([final])
        await inbox.receive()
        await subscription.settle([Ack(delivery)])
        took.append(time.perf_counter() - begun)
    # What idle receivers ask, too.
    waiting = asyncio.create_task(subscription.receive({"default": 1}, 1))
    await asyncio.wait({waiting}, timeout=0.5)
    await broker.publish([message(delay=0.2)])
    (delivery,) = await asyncio.wait_for(waiting, PATIENCE)
    await subscription.settle([Ack(delivery)])
    await broker.stop()
    await storage.stop()
    return median(took)


async def blocks(url: str, namespace: str) -> int:
    """Return how many blocks the server read for some tasks."""
    before = await read(url)
    await work(url, namespace)
    return await read(url) - before


async def read(url: str) -> int:
    """Return the server's count, to which connections add what they have done as they end."""
    connection = await asyncpg.connect(url)
    count, same = -1, 0
    async with asyncio.timeout(PATIENCE):
        while same < 5:
            await asyncio.sleep(0.02)
            now: int = await connection.fetchval(BLOCKS)
            same = same + 1 if now == count else 0
            count = now
    await connection.close()
    return count


@pytest.mark.usefixtures("snapshot")
async def test_tasks_read_as_much_beside_dead_rows(fresh: str) -> None:
    alone = await blocks(fresh, "app")
    await die(fresh, "app", 30_000)
    await work(fresh, "app", 1)  # the first who comes finds out where the dead end
    beside = await blocks(fresh, "app")
    assert beside < 3 * alone, (beside, alone)


@pytest.mark.usefixtures("snapshot")
async def test_receivers_at_work_pass_the_dead_once(fresh: str) -> None:
    """They come to know of the dead as time passes, those of others included."""
    broker = PostgresBroker(fresh)
    await broker.start("app")
    subscription = await broker.subscribe({"default": 1})
    waiting = asyncio.create_task(subscription.receive({"default": 1}, 1))
    await asyncio.wait({waiting}, timeout=0.2)
    await die(fresh, "app", 30_000)
    await broker.publish([message()])
    (delivery,) = await asyncio.wait_for(waiting, PATIENCE)
    await subscription.settle([Ack(delivery)])
    read_by_one = 0
    async with asyncio.timeout(PATIENCE):
        while True:  # until a look costs little
            before = await read(fresh)
            await broker.publish([message(delay=0.01)])
            (delivery,) = await subscription.receive({"default": 1}, 1)
            await subscription.settle([Ack(delivery)])
            await asyncio.sleep(1.1)  # the server's sessions tell once a second what they did
            await subscription.extend([delivery])
            read_by_one = await read(fresh) - before
            if read_by_one < 2_000:
                break
    await broker.stop()


@pytest.mark.full
@pytest.mark.usefixtures("snapshot")
async def test_tasks_take_as_long_beside_a_million_dead_rows(fresh: str) -> None:
    alone = await work(fresh, "app", 200)
    await die(fresh, "app", 1_000_000)
    await work(fresh, "app", 1)
    beside = await work(fresh, "app", 200)
    print(f"{alone * 1000:.1f} ms a task alone, {beside * 1000:.1f} ms beside the dead")
    assert beside < 3 * alone


async def test_a_publisher_that_commits_late_is_not_passed_over(
    fresh: str, admin: asyncpg.Connection
) -> None:
    """His ids are lower than those of many that came and went before he committed."""
    broker = PostgresBroker(fresh)
    await broker.start("app")
    subscription = await broker.subscribe({"default": 100})
    late = [message(), message(delay=0.1), message(priority=9)]
    transaction = admin.transaction()
    await transaction.start()
    await broker.publish(late, transaction=admin)
    begun = time.monotonic()
    while time.monotonic() - begun < 2.5:  # as long as floors need to rise twice
        await broker.publish([message() for _ in range(100)])
        deliveries = await subscription.receive({"default": 100}, 100)
        await subscription.settle([Ack(delivery) for delivery in deliveries])
    await transaction.commit()
    wanted = {m.uuid for m in late}
    got: set[str] = set()
    async with asyncio.timeout(PATIENCE):
        while not wanted <= got:
            deliveries = await subscription.receive({"default": 100}, 100)
            got |= {d.message.uuid for d in deliveries if isinstance(d.message, TaskMessage)}
    await broker.stop()


async def test_tables_that_were_emptied_begin_anew(fresh: str, admin: asyncpg.Connection) -> None:
    broker = PostgresBroker(fresh)
    await broker.start("app")
    subscription = await broker.subscribe({"default": 100})
    for _ in range(3):
        await broker.publish([message() for _ in range(100)])
        await subscription.settle(
            [Ack(d) for d in await subscription.receive({"default": 100}, 100)]
        )
    await admin.execute("TRUNCATE qtasks.messages RESTART IDENTITY")
    await broker.publish([message()])
    assert await asyncio.wait_for(subscription.receive({"default": 1}, 1), PATIENCE)
    await broker.stop()
