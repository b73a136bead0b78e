"""asyncpg alone: SKIP LOCKED, arrays with unnest, LISTEN for the results."""

from __future__ import annotations

import asyncio
from uuid import uuid4

import asyncpg

from benchmarks.bare import BATCH, MESSAGE, RECEIVE, RECORD
from benchmarks.bare.clock import Rate, round_trips

SCHEMA = """
    CREATE TABLE bare_messages (id bigserial PRIMARY KEY, uuid text, held bool DEFAULT false,
                                data bytea);
    CREATE INDEX ON bare_messages (id) WHERE NOT held;
    CREATE TABLE bare_records (uuid text PRIMARY KEY, data bytea) WITH (fillfactor = 60);
"""
ENQUEUE = """
    WITH message AS (INSERT INTO bare_messages (uuid, data)
                     SELECT u, $2 FROM unnest($1::text[]) u)
    INSERT INTO bare_records SELECT u, $3 FROM unnest($1::text[]) u
"""
RECEIVE_SQL = """
    UPDATE bare_messages m SET held = true FROM (
        SELECT id FROM bare_messages WHERE NOT held ORDER BY id LIMIT $1 FOR UPDATE SKIP LOCKED
    ) n WHERE m.id = n.id RETURNING m.id, m.uuid, m.data
"""
COMPLETE = """
    WITH gone AS (DELETE FROM bare_messages WHERE id = ANY($1::bigint[]))
    UPDATE bare_records SET data = $3 WHERE uuid = ANY($2::text[])
"""


async def run(url: str, tasks: int) -> dict[str, float]:
    """Measure on new tables in the database of `url`."""
    connection = await asyncpg.connect(url)
    await connection.execute(SCHEMA)
    with Rate(tasks) as bulk:
        for _ in range(0, tasks, BATCH):
            await enqueue(connection, BATCH)
    with Rate(tasks) as processed:
        while await process(connection):
            pass
    trips = await round_trip(url, connection)
    await connection.execute("DROP TABLE bare_messages, bare_records")
    await connection.close()
    return {"bulk": bulk.value, "process": processed.value, **trips}


async def enqueue(connection: asyncpg.Connection, count: int) -> None:
    uuids = [str(uuid4()) for _ in range(count)]
    await connection.execute(ENQUEUE, uuids, MESSAGE, RECORD)


async def process(connection: asyncpg.Connection) -> int:
    rows = await connection.fetch(RECEIVE_SQL, RECEIVE)
    if rows:
        uuids = [row["uuid"] for row in rows]
        await connection.fetch("SELECT data FROM bare_records WHERE uuid = ANY($1)", uuids)
        await connection.execute(COMPLETE, [row["id"] for row in rows], uuids, RECORD)
    return len(rows)


async def round_trip(url: str, connection: asyncpg.Connection) -> dict[str, float]:
    """Measure round trips: NOTIFY tells the worker of messages, and the client of results."""
    worker, asked, answered = await asyncpg.connect(url), asyncio.Event(), asyncio.Event()
    await worker.add_listener("bare_work", lambda *_: asked.set())
    await connection.add_listener("bare_done", lambda *_: answered.set())

    async def work() -> None:
        while True:
            await asked.wait()
            asked.clear()
            if await process(worker):
                await worker.execute("NOTIFY bare_done")

    async def once() -> None:
        answered.clear()
        await enqueue(connection, 1)
        await connection.execute("NOTIFY bare_work")
        await answered.wait()

    working = asyncio.create_task(work())
    try:
        return await round_trips(once)
    finally:
        working.cancel()
        await asyncio.wait({working})
        await worker.close()
