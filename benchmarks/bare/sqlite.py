"""sqlite3 alone, in WAL mode, with the durability of the embedded default."""

from __future__ import annotations

import sqlite3
from uuid import uuid4

from benchmarks.bare import BATCH, MESSAGE, RECEIVE, RECORD
from benchmarks.bare.clock import Rate, round_trips


async def run(url: str, tasks: int) -> dict[str, float]:
    """Measure on a new file beside the one in `url`."""
    path = url.partition("://")[2].removeprefix("/") + "-bare"
    database = sqlite3.connect(path, isolation_level=None)
    database.executescript(
        "PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL;"
        "CREATE TABLE messages (id INTEGER PRIMARY KEY, uuid TEXT, held REAL, data BLOB);"
        "CREATE TABLE records (uuid TEXT PRIMARY KEY, data BLOB) WITHOUT ROWID;"
    )
    uuids = [str(uuid4()) for _ in range(tasks)]
    with Rate(tasks) as bulk:
        for at in range(0, tasks, BATCH):
            enqueue(database, uuids[at : at + BATCH])
    with Rate(tasks) as processed:
        while process(database):
            pass

    async def once() -> None:
        enqueue(database, [str(uuid4())])
        process(database)

    trips = await round_trips(once)
    database.close()
    return {"bulk": bulk.value, "process": processed.value, **trips}


def enqueue(database: sqlite3.Connection, uuids: list[str]) -> None:
    database.execute("BEGIN IMMEDIATE")
    database.executemany(
        "INSERT INTO messages (uuid, data) VALUES (?, ?)", [(uuid, MESSAGE) for uuid in uuids]
    )
    database.executemany("INSERT INTO records VALUES (?, ?)", [(uuid, RECORD) for uuid in uuids])
    database.execute("COMMIT")


def process(database: sqlite3.Connection) -> int:
    rows = database.execute(
        "UPDATE messages SET held = 1 WHERE id IN (SELECT id FROM messages WHERE held IS NULL"
        " ORDER BY id LIMIT ?) RETURNING id, uuid, data",
        (RECEIVE,),
    ).fetchall()
    marks = ",".join("?" * len(rows))
    uuids = [row[1] for row in rows]
    database.execute(f"SELECT data FROM records WHERE uuid IN ({marks})", uuids).fetchall()
    database.execute("BEGIN IMMEDIATE")
    database.executemany(
        "UPDATE records SET data = ? WHERE uuid = ?", [(RECORD, uuid) for uuid in uuids]
    )
    database.executemany("DELETE FROM messages WHERE id = ?", [(row[0],) for row in rows])
    database.execute("COMMIT")
    return len(rows)
