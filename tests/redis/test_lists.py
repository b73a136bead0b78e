"""The lists of records: what they cost, and that nothing stays in them for ever."""

from __future__ import annotations

import asyncio
import time
from uuid import uuid4

import pytest
from msgspec.structs import replace
from redis.asyncio import Redis

from qtasks_core import DONE, Status, Task, TaskQuery
from qtasks_redis import RedisStorage
from qtasks_redis.listing import expire
from tests.services import Service


def record(status: Status, **fields: object) -> Task:
    return Task(uuid=str(uuid4()), task_name="a", status=status, **fields)  # type: ignore[arg-type]


async def left_of(storage: RedisStorage, server: Redis) -> set[str]:
    """Return the keys of the namespace, without the namespace."""
    start = storage.started().key("", "")[:-1]
    return {key.decode()[len(start) :] async for key in server.scan_iter(f"{start}*")}


async def all_of(storage: RedisStorage, query: TaskQuery) -> list[Task]:
    tasks: list[Task] = []
    while True:
        page = await storage.query(query)
        tasks += page.tasks
        if page.cursor is None:
            return tasks
        query = replace(query, cursor=page.cursor)


async def steps(server: Redis) -> int:
    """Return how many commands the server has run, also within scripts."""
    stats = await server.info("commandstats")
    return sum(told["calls"] for name, told in stats.items() if name != "cmdstat_info")


async def test_a_page_costs_the_same_in_a_large_store(storage: RedisStorage, server: Redis) -> None:
    rare = [record("error", queue="rare", created_at=float(at)) for at in range(5)]
    assert await storage.save(rare) == [DONE] * 5
    costs: list[int] = []
    for _ in range(2):
        before = await steps(server)
        for query in (
            TaskQuery(limit=5),
            TaskQuery(limit=5, queue="rare"),
            TaskQuery(limit=5, status=("error",), dead=False),
            TaskQuery(limit=5, created_before=3.0),
        ):
            assert len((await storage.query(query)).tasks) in (3, 5)
        costs.append(await steps(server) - before)
        many = [record("success", created_at=100.0 + at) for at in range(5000)]
        assert await storage.save(many) == [DONE] * 5000
    # Where the rows of one page begin is found by halving.
    assert costs[1] < costs[0] + 40


async def test_pages_of_records_of_one_moment(storage: RedisStorage) -> None:
    records = [record("new", created_at=7.0) for _ in range(700)]
    records += [record("success", created_at=7.0, queue="other") for _ in range(700)]
    await storage.save(records)
    listed = await all_of(storage, TaskQuery(limit=101))
    assert [task.uuid for task in listed] == sorted((r.uuid for r in records), reverse=True)


async def test_more_names_than_one_script_merges(storage: RedisStorage) -> None:
    records = [
        replace(record("new", created_at=float(at % 37)), task_name=f"name {at % 70}")
        for at in range(400)
    ]
    await storage.save(records)
    expected = sorted(records, key=lambda r: (r.created_at, r.uuid), reverse=True)
    assert await all_of(storage, TaskQuery(limit=33)) == expected
    named = [r for r in expected if r.task_name == "name 69"]
    assert await all_of(storage, TaskQuery(task_name="name 69", limit=2)) == named


async def test_a_record_that_moves_leaves_its_old_lists(
    storage: RedisStorage, server: Redis
) -> None:
    first = record("new", created_at=1.0)
    moved = replace(first, status="process", queue="other", task_name="b")
    await storage.save([first])
    await storage.save([moved])
    assert (await storage.query(TaskQuery())).tasks == [moved]
    assert {key for key in await left_of(storage, server) if key.startswith("index:")} == {
        'index:["other","b"]:process'
    }
    again = replace(moved, attempt=2, queue="third")
    await storage.save([again])
    assert (await storage.query(TaskQuery())).tasks == [again]
    assert {key for key in await left_of(storage, server) if key.startswith("index:")} == {
        'index:["third","b"]:process'
    }


async def test_one_uuid_twice_in_one_call(storage: RedisStorage) -> None:
    first = record("new", created_at=1.0)
    last = replace(first, status="success")
    assert await storage.save([first, replace(first, status="process"), last]) == [DONE] * 3
    assert (await storage.query(TaskQuery())).tasks == [last]
    assert (await storage.query(TaskQuery(status=("new", "process")))).tasks == []


@pytest.mark.parametrize("by", ["reader", "expire"])
async def test_nothing_is_left_of_a_record_that_the_server_has_expired(
    storage: RedisStorage, server: Redis, by: str
) -> None:
    over = [record("success", retention=0.3), record("error", retention=0.3, dead="no")]
    await storage.save([replace(over[0], status="new"), *over])
    await storage.append(over[0].uuid, [b"item"])
    await asyncio.sleep(0.5)
    assert await storage.get([task.uuid for task in over]) == [None, None]
    if by == "reader":
        assert (await storage.query(TaskQuery())).tasks == []
        assert await server.zcard(storage.started().key("index", '["default","a"]:dead')) == 0
    # A reader has removed what it found to be gone.
    assert await storage.expire() == (0 if by == "reader" else 2)
    assert await left_of(storage, server) == set()


async def test_a_uuid_with_a_new_record_outlives_the_old_one(storage: RedisStorage) -> None:
    old = record("success", retention=0.2)
    await storage.save([old])
    await asyncio.sleep(0.4)
    new = replace(old, execution="another", retention=float("inf"))
    assert await storage.save([new]) == [DONE]
    assert (await storage.query(TaskQuery())).tasks == [new]
    assert await storage.expire() == 0
    assert (await storage.query(TaskQuery())).tasks == [new]
    other = record("success", retention=0.2, created_at=-1.0)
    await storage.save([other])
    await asyncio.sleep(0.4)
    waiting = replace(other, status="new", execution="another")
    assert await storage.save([waiting]) == [DONE]
    assert await all_of(storage, TaskQuery(limit=1)) == [new, waiting]
    await storage.expire()
    assert await storage.get([other.uuid]) == [waiting]
    assert (await storage.query(TaskQuery(status=("new",)))).tasks == [waiting]


async def test_a_deleted_record_leaves_nothing(storage: RedisStorage, server: Redis) -> None:
    ever = float("inf")
    records = [record("new"), *(record("error", dead=d, retention=ever) for d in ("no", None))]
    await storage.save([*records, soon := record("success", retention=1.0)])
    records.append(soon)
    broken = record("error", dead="no", created_at=5.0, retention=ever)
    await storage.save([broken])
    connection = storage.started()
    key = connection.key("record", broken.uuid)
    value = await connection.call("GET", key)
    await connection.call("SET", key, value[:13] + b"no record", "KEEPTTL")
    (listed,) = (await storage.query(TaskQuery(dead=True, limit=1))).tasks
    assert (listed.uuid, listed.created_at) == (broken.uuid, 5.0)
    assert listed.error is not None
    assert listed.dead is not None
    assert await storage.delete([r.uuid for r in (*records, broken)]) == 5
    await asyncio.sleep(1.2)
    assert await storage.expire() == 0, "what was deleted has not expired"
    assert await left_of(storage, server) == set()


async def test_items_without_a_record_go_after_the_retention(
    redis_server: Service, server: Redis
) -> None:
    storage = RedisStorage(redis_server.url, retention=0.5)
    await storage.start(f"lists-{uuid4().hex[:8]}")
    running = record("process")
    await storage.save([running])
    await storage.append("none", [b"item"])
    await storage.append(running.uuid, [b"item"])
    await storage.expire()
    assert await storage.read("none", 0) == [(1, b"item")]
    await asyncio.sleep(0.7)
    await storage.expire()
    assert await storage.read("none", 0) == []
    assert await storage.read(running.uuid, 0) == [(1, b"item")]
    await storage.stop()


async def test_many_records_expire_in_short_scripts(storage: RedisStorage) -> None:
    finished = time.time() - 100
    records = [record("success", finished_at=finished, retention=50.0) for _ in range(1700)]
    await storage.save(records)
    assert await expire(storage.started()) == 1700
    assert (await storage.query(TaskQuery())).tasks == []
