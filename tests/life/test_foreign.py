"""Messages of another program, mutated: they are kept as dead, and the rest goes on."""

from __future__ import annotations

import asyncio
import math
import random
import sqlite3
from pathlib import Path
from typing import Any

from qtasks.asyncio import QueueTasks
from qtasks.control import query
from qtasks_core import Raw, Task, TaskMessage, TaskQuery
from qtasks_core.wire import decode_message, encode_message
from tests.life.app import nap
from tests.life.setting import Setting

MUTATED = 10_000


def mutations(original: bytes, seed: int) -> list[bytes]:
    """Return distinct mutations of a message that are no messages any more."""
    dice = random.Random(seed)
    found: set[bytes] = set()
    while len(found) < MUTATED:
        data = bytearray(original)
        for _ in range(dice.randint(1, 8)):
            at = dice.randrange(len(data))
            kind = dice.randrange(4)
            if kind == 0:
                data[at] = dice.randrange(256)
            elif kind == 1:
                data[at:at] = dice.randbytes(dice.randint(1, 5))
            elif kind == 2:
                del data[at : at + dice.randint(1, 5)]
            else:
                del data[at:]
            if not data:
                break
        if isinstance(decode_message(bytes(data)), Raw):
            found.add(bytes(data))
    return list(found)


def insert(path: Path, datas: list[bytes]) -> None:
    """Put them into the queue `default` of the only namespace, as the program's own rows."""
    with sqlite3.connect(path, timeout=30) as database:
        queues = database.execute("SELECT id FROM qtasks_queues WHERE name = 'default'")
        (queue,) = queues.fetchone()
        database.executemany(
            "INSERT INTO qtasks_messages (queue, priority, wake_at, holder, count, data) "
            "VALUES (?, 5, NULL, 0, 0, ?)",
            [(queue, data) for data in datas],
        )
    database.close()


async def test_ten_thousand_mutated_messages(setting: Setting, tmp_path: Path) -> None:
    message = TaskMessage(
        uuid="01a20dff-7d5c-7000-8000-000000000000", task_name="nap", args=b"\x91\xcb" + bytes(8),
        headers={"trace": "00-4bf92f"}, expires_at=2e9, created_at=1e9, priority=7,
    )  # fmt: skip
    wrong = mutations(encode_message(message), 1)
    async with setting.app() as app:
        before = await nap.using(app).map([(0.001,)] * 500)
        await asyncio.to_thread(insert, tmp_path / "qtasks.db", wrong)
        after = await nap.using(app).map([(0.001,)] * 500)
        with setting.worker() as worker:
            async with asyncio.timeout(120):
                for task in [*before, *after]:
                    assert (await task.wait_result()).status == "success"
            assert await asyncio.to_thread(worker.terminate) == 0
        kept = await dead(app)
    assert {record.args for record in kept} == set(wrong)
    assert {record.dead for record in kept} == {"undecodable"}


ODD: list[dict[str, Any]] = [
    *({"priority": priority} for priority in (-(2**63), 2**64 - 1)),
    *({"attempt": attempt} for attempt in (-(2**63), 2**60, 2**64 - 1)),
    *({"created_at": time} for time in (math.nan, math.inf, 1e300)),
    *({"retention": seconds} for seconds in (math.nan, -math.inf, 1e300)),
    {"uuid": "u" * 10_000},
    {"headers": {"qtasks-unknown": "x", "qtasks-lone-runs": "x"}},
    {"headers": {"qtasks-unknown": "9" * 5000, "qtasks-lone-runs": "-1"}},
    {"encoding": "pickle", "reply_to": "nobody", "submission": "x"},
]


async def test_messages_whose_values_are_odd(setting: Setting, tmp_path: Path) -> None:
    """What would make a storage or the engine fail would end each worker in turn."""
    datas = [
        encode_message(TaskMessage(**{"uuid": f"{n} {name}", "task_name": name, **fields}))
        for n, fields in enumerate(ODD)
        for name in ("nap", "unknown")
    ]
    async with setting.app() as app:
        before = await nap.using(app).map([(0.001,)] * 10)
        await asyncio.to_thread(insert, tmp_path / "qtasks.db", datas)
        after = await nap.using(app).map([(0.001,)] * 10)
        with setting.worker() as worker:
            async with asyncio.timeout(60):
                for task in [*before, *after]:
                    assert (await task.wait_result()).status == "success"
            assert await asyncio.to_thread(worker.terminate) == 0


async def dead(app: QueueTasks) -> list[Task]:
    """Return all dead records."""
    found: list[Task] = []
    cursor: str | None = None
    while True:
        page = await app.control(query, TaskQuery(dead=True, limit=1000, cursor=cursor))
        found += page.tasks
        cursor = page.cursor
        if cursor is None:
            return found
