"""Every broker with every storage: the same tasks have the same answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from examples.fastapi_shop.shop.tasks import example_task, router
from qtasks import Retry, Task, TaskCancelled, TaskFailed, control
from qtasks.asyncio import QueueTasks
from qtasks_core import TaskQuery
from tests.pairs import ALL, pair_of

WAIT = 120.0
"""Seconds. A busy machine is slow."""
DELAY = 0.5


@pytest.fixture(params=ALL)
async def app(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[QueueTasks]:
    # On a busy machine a short lease may end while a task runs, which then runs twice.
    pair = pair_of(request, request.param, tmp_path, lease=30.0)
    app = QueueTasks(f"pairs-{uuid4().hex[:8]}", pair.broker, pair.storage)
    app.include_router(router)
    async with app:
        yield app


async def test_a_pair_answers_as_every_other(app: QueueTasks) -> None:
    runs: list[int] = []
    urgent: list[int] = []
    begun, stopped = asyncio.Event(), asyncio.Event()

    @app.task(name="fails")
    async def fails() -> None:
        raise ValueError("no")

    @app.task(name="tries", retry=2)
    async def tries() -> int:
        runs.append(len(runs))
        if len(runs) < 3:
            raise Retry(after=0.1)
        return len(runs)

    @app.task(name="ranks", queue="ranked")
    async def ranks(priority: int) -> None:
        urgent.append(priority)

    @app.task(name="holds")
    async def holds() -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            stopped.set()

    waiting = [await ranks.add_task(priority, priority=priority) for priority in (1, 5, 9)]
    async with app.worker(queues=["default"]):
        added = await example_task.using(app).add_task(1, 2, timeout=WAIT)
        failed = await fails.add_task(timeout=WAIT)
        tried = await tries.add_task(timeout=WAIT)
        late = await example_task.using(app).add_task(3, 4, delay=DELAY, timeout=WAIT)
        held = await holds.add_task()
        async with asyncio.timeout(WAIT):
            await begun.wait()
            assert await app.cancel(held.uuid)
            await stopped.wait()
        cancelled = await held.wait_result(WAIT)
    async with app.worker(queues=["ranked"], concurrency=1):
        ranked = [await task.wait_result(WAIT) for task in waiting]

    assert (added.status, added.returning) == ("success", 3)
    assert failed.status == "error"
    with pytest.raises(TaskFailed, match="ValueError: no"):
        failed.returning  # noqa: B018
    assert (tried.status, tried.returning, tried.attempt) == ("success", 3, 3)
    assert (late.status, late.returning) == ("success", 7)
    assert late.started_at is not None
    assert late.started_at - late.created_at >= DELAY
    assert cancelled.status == "cancel"
    with pytest.raises(TaskCancelled):
        cancelled.returning  # noqa: B018
    assert {task.status for task in ranked} == {"success"}
    # Without priorities, which the guarantees tell, the order of the log may be another.
    assert urgent == [9, 5, 1] or (not app.guarantees()[0].priorities and len(urgent) == 3)
    done: list[Task[Any]] = [added, failed, tried, late, cancelled, *ranked]
    assert await listed(app) == {(task.uuid, task.task_name, task.status) for task in done}
    assert await listed(app, task_name="fails", dead=True) == {(failed.uuid, "fails", "error")}
    assert await listed(app, status=("cancel",)) == {(cancelled.uuid, "holds", "cancel")}


async def listed(app: QueueTasks, **wanted: Any) -> set[tuple[str, str, str]]:
    """Return what the pages of a query list, each task once."""
    tasks: list[Any] = []
    cursor: str | None = None
    while True:
        query = TaskQuery(**wanted, limit=3, cursor=cursor)
        page = await app.control(control.query, query)
        tasks += page.tasks
        cursor = page.cursor
        if cursor is None:
            break
    assert [t.created_at for t in tasks] == sorted((t.created_at for t in tasks), reverse=True)
    found = {(task.uuid, task.task_name, task.status) for task in tasks}
    assert len(found) == len(tasks)
    return found
