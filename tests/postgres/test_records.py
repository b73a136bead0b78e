"""The table of records: what a person reads in it, and what lists and deletions cost."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID

import asyncpg
import pytest

from qtasks.codec.serializers import MsgpackSerializer
from qtasks_core import DONE, Task, TaskMessage, TaskQuery
from qtasks_core.wire import encode_task
from qtasks_postgres import PostgresBroker, PostgresStorage, listing
from qtasks_postgres import storage as storage_of
from qtasks_postgres.connection import SETTINGS
from qtasks_postgres.schema import STEPS, VERSION, ensure_schema


@pytest.fixture
async def storage(fresh: str) -> AsyncIterator[PostgresStorage]:
    storage = PostgresStorage(fresh)
    await storage.start("app")
    yield storage
    await storage.stop()


def packed(value: Any) -> bytes:
    serializer = MsgpackSerializer()
    return serializer.encode(serializer.encoder(Any)(value))


async def test_a_person_reads_records_and_messages(
    fresh: str, admin: asyncpg.Connection, storage: PostgresStorage
) -> None:
    values = [
        1, -1, 127, 128, -32, -33, 255, 2**16, -(2**15), 2**31, -(2**31), 2**63, -(2**63), True,
        None, "größe", "x" * 40, "y" * 300, "z" * 70_000, 1.5, -0.1, 1e-300, 5e-324, 0.0, [],
        list(range(20)), {"a": {"b": [1]}}, {str(at): at for at in range(20)},
    ]  # fmt: skip
    record = Task(
        uuid="u1", task_name="mails.send", status="error", queue="mail", attempt=3,
        created_at=1.5e9, args=packed(values), kwargs=packed({"name": "Ann"}),
        returning=packed("ok"), dead="no", headers={"tenant": "one"}, finished_at=time.time(),
    )  # fmt: skip
    await storage.save([record])
    row = await admin.fetchrow("SELECT *, record::text AS shown FROM qtasks.tasks")
    assert row is not None
    assert (row["app"], row["uuid"], row["task_name"], row["queue"]) == (
        "app", "u1", "mails.send", "mail",
    )  # fmt: skip
    assert (row["status"], row["attempt"], row["dead"]) == ("error", 3, "no")
    assert row["created_at"].timestamp() == 1.5e9
    shown = json.loads(row["shown"])
    assert shown["args"] == values
    assert (shown["kwargs"], shown["returning"]) == ({"name": "Ann"}, "ok")
    assert shown["headers"] == {"tenant": "one"}

    tagged = packed([(1, 2), {3}, UUID(int=7), b"\xff"])
    await storage.save([Task(uuid="u2", task_name="t", status="new", args=tagged)])
    odd = [(b"\x01\x81", "broken"), (b"\x07", "of another version"), (b"", "empty")]
    for data, uuid in odd:
        await storage.save([Task(uuid=uuid, task_name="t", status="new")])
        await admin.execute("UPDATE qtasks.records SET record = $1 WHERE uuid = $2", data, uuid)
    rows = await admin.fetch("SELECT uuid, record::text AS shown FROM qtasks.tasks")
    found = {row["uuid"]: row["shown"] for row in rows}
    assert json.loads(found["u2"])["args"] == [[1, 2], [3], str(UUID(int=7)), "/w=="]
    assert [found[uuid] for _, uuid in odd] == [None] * 3

    broker = PostgresBroker(fresh)
    await broker.start("app")
    await broker.publish([TaskMessage(uuid="m1", task_name="t", args=packed([1]), priority=7)])
    await broker.stop()
    row = await admin.fetchrow("SELECT *, message::text AS shown FROM qtasks.queued")
    assert row is not None
    assert (row["app"], row["queue"], row["priority"]) == ("app", "default", 7)
    assert json.loads(row["shown"])["args"] == [1]


MANY = """
    INSERT INTO qtasks.records (
        namespace, uuid, progress, execution, status, task_name, queue, created_at, dead,
        remarkable, record
    )
    SELECT 'app', 'u' || at, 8 + rank, '', status, name, 'q' || at % 3, at,
           CASE WHEN status = 'error' THEN 'no' END, CASE WHEN status = 'error' THEN status END, $1
    FROM (
        SELECT at, CASE WHEN at % 20000 = 7 THEN 'error' ELSE 'success' END AS status,
               CASE WHEN at % 20000 = 7 THEN 5 ELSE 4 END AS rank,
               CASE WHEN at < 20 THEN 'rare' ELSE 'name' || at % 5 END AS name
        FROM generate_series(1, 100000) AS at
    ) AS made
"""


async def test_a_list_costs_what_its_page_costs(
    fresh: str, admin: asyncpg.Connection, storage: PostgresStorage
) -> None:
    await admin.execute(MANY, encode_task(Task(uuid="u", task_name="t", status="success")))
    await admin.execute("VACUUM ANALYZE qtasks.records")
    connection = await asyncpg.connect(fresh, server_settings=SETTINGS)
    for query, count in (
        (TaskQuery(limit=20), 20),
        (TaskQuery(limit=20, cursor="50000.0 u50000"), 20),
        (TaskQuery(limit=20, task_name="rare"), 19),
        (TaskQuery(limit=20, queue="q1"), 20),
        (TaskQuery(limit=20, queue="q1", task_name="name2"), 20),
        (TaskQuery(limit=20, created_before=30_000.0, created_after=10_000.0), 20),
        (TaskQuery(limit=20, dead=True), 5),
        (TaskQuery(limit=20, status=("error", "retry")), 5),
    ):
        page = await storage.query(query)
        assert len(page.tasks) == count, query
        last = (50_000.0, "u50000") if query.cursor else None
        statement, values = listing.looking("app", query, last, query.limit)
        told = await connection.fetchval(
            f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {statement}", *values
        )
        plan = json.loads(told)[0]["Plan"]
        assert plan["Shared Hit Blocks"] + plan["Shared Read Blocks"] < 1000, query
    await connection.close()


@pytest.mark.parametrize("statement", [storage_of.GET, storage_of.BEGUN, listing.DELETE])
@pytest.mark.parametrize("known", [False, True], ids=["empty table", "new app"])
async def test_a_uuid_is_looked_up_by_the_key(
    admin: asyncpg.Connection, storage: PostgresStorage, statement: str, known: bool
) -> None:
    """Then the planner expects no row. In another index, each lookup would read the whole app."""
    if known:
        await admin.execute(MANY, encode_task(Task(uuid="u", task_name="t", status="success")))
        await admin.execute("VACUUM ANALYZE qtasks.records")
    for name, value in SETTINGS.items():
        await admin.execute(f"SET {name} = '{value}'")
    await admin.execute(f"PREPARE lookup AS {statement}")
    for mode in ("force_generic_plan", "force_custom_plan"):
        await admin.execute(f"SET plan_cache_mode = {mode}")
        rows = await admin.fetch("EXPLAIN EXECUTE lookup('another', '{u1,u2}')")
        plan = "\n".join(row[0] for row in rows)
        assert "records_pkey on records" in plan, plan
        assert "records_listed" not in plan, plan


async def test_a_status_that_few_records_have_is_found_among_many(
    admin: asyncpg.Connection, storage: PostgresStorage
) -> None:
    await admin.execute(MANY, encode_task(Task(uuid="u", task_name="t", status="success")))
    await storage.save([Task(uuid="old", task_name="t", status="new", created_at=0.5)])
    page = await storage.query(TaskQuery(status=("new",)))
    assert [task.uuid for task in page.tasks] == ["old"]
    assert page.cursor is None


async def test_columns_have_the_texts_of_the_records(
    admin: asyncpg.Connection, storage: PostgresStorage
) -> None:
    odd = ['"', "\\", "{,}", "NULL", "None", "", " ", '\\"', "\n\t", "größe", "'", "\0"]
    tasks = [
        Task(
            uuid=f"u{at:02}", task_name=text, status="error", dead=text if at % 2 else None,
            created_at=float(at), args=bytes(range(at)),
        )
        for at, text in enumerate(odd)
    ]  # fmt: skip
    for some in (tasks, tasks[::-1]):
        assert await storage.save(some) == [DONE] * len(tasks)
        assert await storage.get([task.uuid for task in some]) == some
    rows = await admin.fetch(
        "SELECT uuid, task_name, dead, created_at, status FROM qtasks.records ORDER BY uuid"
    )
    assert [tuple(row) for row in rows] == [
        (t.uuid, t.task_name.replace("\0", "\ufffd"), t.dead and t.dead.replace("\0", "\ufffd"),
         t.created_at, "error")
        for t in tasks
    ]  # fmt: skip


async def test_a_final_save_leaves_the_indexes_alone(
    admin: asyncpg.Connection, storage: PostgresStorage
) -> None:
    """Else each task would write three more index entries, for vacuum to remove."""
    new = [Task(uuid=f"u{at}", task_name="t", status="new", created_at=at) for at in range(500)]
    for task in new:
        await storage.save([task])
    await storage.save(
        [Task(uuid=t.uuid, task_name="t", status="success", created_at=t.created_at) for t in new]
    )
    changes = "SELECT n_tup_upd, n_tup_hot_upd FROM pg_stat_user_tables WHERE relname = 'records'"
    async with asyncio.timeout(120):
        while True:
            row = await admin.fetchrow(changes)
            assert row is not None
            if row["n_tup_upd"] >= 500:
                break
            await asyncio.sleep(0.2)
    assert row["n_tup_hot_upd"] > 450


async def test_many_records_expire_in_short_statements(
    admin: asyncpg.Connection, storage: PostgresStorage
) -> None:
    def finals(many: int, first: int, retention: float) -> list[Task]:
        return [
            Task(
                uuid=f"u{first + at}", task_name="t", status="success", retention=retention,
                finished_at=1000.0 + at / 50,
            )
            for at in range(many)
        ]  # fmt: skip

    await storage.save(finals(7000, 0, 50.0))
    for task in finals(30, 7000, 50.0):
        await storage.save([task])
    await storage.save(finals(10, 8000, float("inf")))
    assert await storage.expire() == 7030
    assert await admin.fetchval("SELECT count(*) FROM qtasks.records") == 10
    assert await admin.fetchval("SELECT count(*) FROM qtasks.expiries") == 0


async def test_old_streams_without_a_record_are_forgotten(
    admin: asyncpg.Connection, storage: PostgresStorage
) -> None:
    for uuid in ("kept", "young", "old"):
        await storage.append(uuid, [b"item"])
    await storage.save([Task(uuid="kept", task_name="t", status="process")])
    await admin.execute(
        "UPDATE qtasks.streams SET created_at = now() - interval '30 days' WHERE uuid <> 'young'"
    )
    await storage.expire()
    assert [bool(await storage.read(uuid, 0)) for uuid in ("kept", "young", "old")] == [
        True, True, False,
    ]  # fmt: skip


async def test_who_watches_a_deleted_task_hears_of_the_next(storage: PostgresStorage) -> None:
    inbox = await storage.inbox()
    await storage.save([Task(uuid="u1", task_name="t", status="process")])
    await inbox.watch(["u1"])
    assert await storage.delete(["u1"]) == 1
    assert await storage.get(["u1"]) == [None]
    assert (await storage.query(TaskQuery())).tasks == []
    final = Task(uuid="u1", task_name="t", status="success")
    await storage.save([final])
    assert await asyncio.wait_for(inbox.receive(), 2) == [final]


async def test_records_of_an_older_release_are_listed_and_expire(
    fresh: str, admin: asyncpg.Connection
) -> None:
    await admin.execute("CREATE SCHEMA qtasks; CREATE TABLE qtasks.version (version integer)")
    for step in STEPS[:2]:
        await admin.execute(step)
    await admin.execute("INSERT INTO qtasks.version VALUES (2)")
    now = time.time()
    records = [
        Task(uuid="new", task_name="t", status="new", created_at=1.0),
        Task(uuid="old", task_name="t", status="success", created_at=2.0, finished_at=1000.0),
        Task(uuid="dead", task_name="t", status="error", dead="no", created_at=3.0,
             finished_at=now),
        Task(uuid="ever", task_name="t", status="success", created_at=4.0, finished_at=1000.0,
             retention=float("inf")),
    ]  # fmt: skip
    for at, record in enumerate(records):
        await admin.execute(
            "INSERT INTO qtasks.records (namespace, uuid, progress, execution, status, task_name,"
            " queue, created_at, dead, record)"
            " VALUES ('app', $1, $2, '', $3, 't', 'default', $4, $5, $6)",
            record.uuid, (8, 12, 13, 12)[at], record.status, record.created_at, record.dead,
            encode_task(record),
        )  # fmt: skip
    storage = PostgresStorage(fresh)
    assert await storage.migrate("app") == [
        f"the schema qtasks updated from version 2 to {VERSION}"
    ]
    await storage.start("app")
    assert (await storage.query(TaskQuery(dead=True))).tasks == [records[2]]
    assert await storage.expire() == 1
    uuids = [task.uuid for task in (await storage.query(TaskQuery())).tasks]
    assert uuids == ["ever", "dead", "new"]
    await storage.stop()


async def test_schemas_share_nothing(fresh: str, admin: asyncpg.Connection) -> None:
    parts = [
        (PostgresBroker(fresh, schema=name), PostgresStorage(fresh, schema=name))
        for name in ("qtasks", "user")
    ]
    for broker, storage in parts:
        await broker.start("app")
        await storage.start("app")
    (broker, storage), (other_broker, other_storage) = parts
    await broker.publish([TaskMessage(uuid="u1", task_name="t")])
    subscription = await other_broker.subscribe({"default": 1})
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(subscription.receive({"default": 1}, 1), 0.5)
    inboxes = [await storage.inbox(), await other_storage.inbox()]
    for inbox in inboxes:
        await inbox.watch(["u1"])
    await other_storage.set("key", b"theirs")
    final = Task(uuid="u1", task_name="t", status="success")
    await other_storage.save([final])
    assert await asyncio.wait_for(inboxes[1].receive(), 2) == [final]
    assert await storage.get(["u1"]) == [None]
    assert await storage.get_value("key") is None
    assert await other_storage.expire() == 0
    assert await admin.fetchval('SELECT uuid FROM "user".tasks') == "u1"
    for broker, storage in parts:
        await broker.stop()
        await storage.stop()
    assert await ensure_schema(admin, "user") == []
