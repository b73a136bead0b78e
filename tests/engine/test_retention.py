"""A final record stops its message, so it is kept at least as long as that may come again."""

from __future__ import annotations

import time
from pathlib import Path
from uuid import uuid4

import pytest

from qtasks.asyncio import QueueTasks
from qtasks.client.client import Client
from qtasks.client.times import cancelled_kept_for, kept_for
from qtasks_core import Task, TaskMessage


@pytest.fixture(params=["memory://{}?lease=5", "sqlite:///{}?lease=5&retention=0"])
def app(request: pytest.FixtureRequest, tmp_path: Path) -> QueueTasks:
    return QueueTasks("retention", request.param.format(f"{tmp_path}/{uuid4().hex}"))


async def expire(client: Client) -> int:
    return await client.storage.expire()


async def publish(client: Client, message: TaskMessage) -> None:
    await client.broker.publish([message])


@pytest.mark.parametrize("asked", [0.0, None])
async def test_a_short_retention_lets_nothing_run_twice(
    app: QueueTasks, asked: float | None
) -> None:
    runs: list[int] = []

    @app.task(retention=asked)
    async def brief() -> None:
        runs.append(1)

    @app.task()
    async def after() -> None: ...

    call = brief.call()
    message = call.message(app)
    async with app, app.worker(concurrency=1):
        await app.submit(message, 5)
        assert await app.control(expire) == 0
        # As after a worker that died between recording the end and settling.
        await app.control(publish, message)
        await after.add_task(timeout=120)
    assert runs == [1]


async def test_a_cancel_outlives_the_wait_of_its_message(app: QueueTasks) -> None:
    runs: list[int] = []

    @app.task(retention=0.0)
    async def later() -> None:
        runs.append(1)

    @app.task()
    async def after() -> None: ...

    async with app:
        task = await later.add_task()
        assert await app.cancel(task.uuid)
        assert await app.control(expire) == 0
        async with app.worker(concurrency=1):
            await after.add_task(timeout=120)
    assert runs == []


async def test_what_a_task_says_is_recorded(app: QueueTasks) -> None:
    @app.task(retention=3600, store_result=False)
    async def said() -> str:
        return "not kept"

    @app.task()
    async def unsaid() -> str:
        return "kept"

    async with app.worker():
        ended = await said.add_task(timeout=120)
        returned: object = ended.returning
        assert (ended.status, returned, ended.record.returning) == ("success", None, None)
        assert ended.record.retention == 3600
        assert (await unsaid.add_task(timeout=120)).returning == "kept"
        again = await app.get_task(ended.uuid)
    assert again is not None
    assert (again.record.retention, again.record.returning) == (3600, None)


def test_what_is_kept() -> None:
    for asked, default, kept in (
        (None, None, None), (None, 100.0, None), (None, 1.0, 10.0),
        (1.0, None, 10.0), (1.0, 100.0, 10.0), (20.0, 1.0, 20.0),
    ):  # fmt: skip
        assert kept_for(asked, default, 10.0) == kept
    due = Task(uuid="u", task_name="t", status="scheduled", due_at=time.time() + 9e6)
    kept = cancelled_kept_for(due, 604_800.0)
    assert kept is not None
    assert kept == pytest.approx(9e6 + 86_400, abs=10)
