"""`qtasks.enqueue`: tasks of triggers and other languages."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from qtasks import control
from qtasks.asyncio import QueueTasks

PAGE = Path(__file__).parents[2] / "docs" / "postgres.md"


@pytest.mark.parametrize("schema", ["qtasks", "other"])
async def test_sql_enqueues_a_task(fresh: str, admin: asyncpg.Connection, schema: str) -> None:
    app = QueueTasks("shop", f"{fresh}?schema={schema}")

    @app.task(name="echo")
    async def echo(*values: Any, **named: Any) -> list[Any]:
        return [list(values), named]

    values = [
        1, -1, 2**62, -(2**62), 0.5, -2.25, True, False, None, "größe", "", [], [[1], {}],
        {"a": {"b": [1, "x"]}}, "x" * 70_000,
    ]  # fmt: skip
    named = {"name": "Ann", "größe": 7}
    async with app, app.worker():
        await asyncio.sleep(0.5)  # until the worker sleeps
        uuid = await admin.fetchval(
            f"SELECT {schema}.enqueue('shop', 'echo', $1, $2)",
            json.dumps(values),
            json.dumps(named),
        )
        task = await app.get_task(uuid)
        assert task is not None
        # Well before a worker would look for itself.
        assert (await task.wait_result(2)).returning == [values, named]
        uuid = await admin.fetchval(f"SELECT {schema}.enqueue('shop', 'echo', delay => 0.5)")
        task = await app.get_task(uuid)
        assert task is not None
        assert task.status == "scheduled"
        finished = await task.wait_result(120)
        assert finished.returning == [[], {}]
        assert finished.created_at is not None
        late = await admin.fetchval(
            f"SELECT {schema}.enqueue('shop', 'echo', queue => 'later', priority => 9,"
            " delay => 600, uuid => 'order 7')"
        )
        assert late == "order 7"
        task = await app.get_task(late)
        assert task is not None
        assert (task.queue, task.priority, task.status) == ("later", 9, "scheduled")
        depths = await app.control(control.depths, ["later"])
        assert depths["later"].delayed == 1


async def test_a_trigger_enqueues_with_its_row(fresh: str, admin: asyncpg.Connection) -> None:
    app = QueueTasks("shop", fresh)
    seen: list[int] = []
    done = asyncio.Event()

    @app.task(name="receipt")
    async def receipt(number: int) -> None:
        seen.append(number)
        done.set()

    async with app, app.worker():
        await admin.execute("""
            CREATE TABLE orders (number integer);
            CREATE FUNCTION placed() RETURNS trigger LANGUAGE plpgsql AS $$
            BEGIN
                PERFORM qtasks.enqueue('shop', 'receipt', jsonb_build_array(NEW.number));
                RETURN NEW;
            END $$;
            CREATE TRIGGER placed AFTER INSERT ON orders FOR EACH ROW EXECUTE FUNCTION placed();
        """)
        undone = admin.transaction()
        await undone.start()
        await admin.execute("INSERT INTO orders VALUES (6)")
        await undone.rollback()
        await admin.execute("INSERT INTO orders VALUES (7)")
        async with asyncio.timeout(120):
            await done.wait()
    assert seen == [7]


@pytest.mark.parametrize(
    "arguments",
    ["'a b', 't'", "'shop', ''", "'shop', 't', '{}'", "'shop', 't', priority => 10",
     "'shop', 't', queue => '-x'", "'shop', 't', delay => -1"],
)  # fmt: skip
async def test_wrong_arguments_are_refused(
    fresh: str, admin: asyncpg.Connection, arguments: str
) -> None:
    app = QueueTasks("shop", fresh)
    async with app:
        with pytest.raises(asyncpg.RaiseError):
            await admin.fetchval(f"SELECT qtasks.enqueue({arguments})")
        assert await admin.fetchval("SELECT count(*) FROM qtasks.messages") == 0


async def test_the_statements_of_the_page_run(fresh: str, admin: asyncpg.Connection) -> None:
    """Each finds what it says: two tasks are enqueued, and the views show them."""
    blocks = re.findall(r"```sql\n(.*?)```", PAGE.read_text(), re.DOTALL)
    enqueuing, reading = ([line for line in block.split(";\n") if line] for block in blocks)
    async with QueueTasks("shop", fresh):
        for statement in enqueuing:
            assert await admin.fetchval(statement)
        tasks, queued = [await admin.fetch(statement) for statement in reading]
    assert tasks == []  # none is in `error`
    assert sorted(row["queue"] for row in queued) == ["default", "mails"]
    assert {row[3] for row in queued} == {"send_receipt"}
