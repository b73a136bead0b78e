"""Waiting for a task that never was leaves nothing behind."""

from __future__ import annotations

import asyncio
from uuid import uuid4

import asyncpg
import pytest

from qtasks import AsyncResult, TaskTimeout
from qtasks.asyncio import QueueTasks

ROWS = "SELECT count(*) FROM qtasks.records WHERE record IS NULL"


async def rows(admin: asyncpg.Connection, count: int) -> None:
    """Wait until there are so many rows without a record."""
    async with asyncio.timeout(120):
        while await admin.fetchval(ROWS) != count:  # noqa: ASYNC110  # of another process
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("stopped", [False, True])
async def test_an_unknown_uuid_leaves_no_row(
    fresh: str, admin: asyncpg.Connection, stopped: bool
) -> None:
    app = QueueTasks("watchers", fresh)

    @app.task()
    async def one() -> int:
        return 1

    uuid = str(uuid4())
    async with app, QueueTasks("watchers", fresh) as other:
        waits = [asyncio.create_task(AsyncResult(uuid, app=a).wait_result()) for a in (app, other)]
        await rows(admin, 1)
        if not stopped:
            for wait in waits:
                wait.cancel()
            await asyncio.wait(waits)
            await rows(admin, 0)
        # Nobody is disturbed by that.
        for each in (app, other):
            with pytest.raises(TaskTimeout):
                await AsyncResult(str(uuid4()), app=each).wait_result(0.05)
        async with app.worker():
            waited = asyncio.create_task(other.get_task((await one.add_task()).uuid))
            task = await waited
            assert task is not None
            assert (await task.wait_result(120)).returning == 1
    await asyncio.wait(waits)
    assert await admin.fetchval(ROWS) == 0
