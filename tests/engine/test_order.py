"""Priorities, where they are promised, and queues, end to end."""

from __future__ import annotations

import asyncio
from pathlib import Path
from uuid import uuid4

import pytest

from qtasks import TaskTimeout
from qtasks.asyncio import QueueTasks
from qtasks.client.client import Client


@pytest.fixture(params=["memory", "sqlite"])
def app(request: pytest.FixtureRequest, tmp_path: Path) -> QueueTasks:
    url = {"memory": "memory://", "sqlite": f"sqlite:///{tmp_path}/q.db"}[request.param]
    return QueueTasks(f"order-{uuid4().hex[:8]}", url)


async def test_9_is_first_and_equals_keep_their_turns(app: QueueTasks) -> None:
    ran: list[tuple[int, int]] = []

    @app.task()
    async def usual(priority: int, n: int) -> None:
        ran.append((priority, n))

    @app.task(priority=8)
    async def urgent(priority: int, n: int) -> None:
        ran.append((priority, n))

    async with app:
        tasks = [
            await usual.add_task(priority, n, priority=priority)
            for n in range(3)
            for priority in (3, 9, 0, 7, 1, 4, 6, 2)
        ]
        for n in range(3):
            tasks += [await usual.add_task(5, n), await urgent.add_task(8, n)]
        assert app.guarantees()[0].priorities
        async with app.worker(concurrency=1):
            for task in tasks:
                await task.wait_result(120)
    assert ran == [(priority, n) for priority in range(9, -1, -1) for n in range(3)]


async def delayed(client: Client) -> int | None:
    return (await client.broker.depth("default")).delayed


async def test_what_becomes_due_takes_its_place_then(app: QueueTasks) -> None:
    ran: list[str] = []
    begun, go_on = asyncio.Event(), asyncio.Event()

    @app.task()
    async def first() -> None:
        begun.set()
        await go_on.wait()

    @app.task()
    async def note(text: str) -> None:
        ran.append(text)

    async with app, app.worker(concurrency=1):
        await first.add_task()
        await begun.wait()
        tasks = [
            await note.add_task("waited", priority=4),
            await note.add_task("low and due later", priority=3, delay=0.1),
            await note.add_task("high and due later", priority=9, delay=0.1),
        ]
        async with asyncio.timeout(120):
            while await app.control(delayed):  # noqa: ASYNC110  # nothing tells of it
                await asyncio.sleep(0.01)
        go_on.set()
        for task in tasks:
            await task.wait_result(120)
    assert ran == ["high and due later", "waited", "low and due later"]


async def test_a_worker_has_the_queues_it_is_given_else_those_of_its_tasks(
    app: QueueTasks,
) -> None:
    ran: list[str] = []

    @app.task(queue="mail")
    async def mail(text: str) -> str:
        ran.append(text)
        return text

    @app.task(queue="pictures")
    async def scale(text: str) -> str:
        ran.append(text)
        return text

    async with app:
        sent = {text: await mail.add_task(text) for text in ("1", "2")}
        for queue in ("pictures", "elsewhere"):
            sent[queue] = await mail.add_task(queue, queue=queue)
        sent["3"] = await scale.add_task("3")
        async with app.worker(queues=["mail"]):
            for text in ("1", "2"):
                assert (await sent[text].wait_result(120)).queue == "mail"
            with pytest.raises(TaskTimeout, match=r"in queue 'pictures'.*no worker for that queue"):
                await sent["3"].wait_result(0.1)
        assert sorted(ran) == ["1", "2"]
        async with app.worker():
            for text in ("pictures", "3"):
                assert (await sent[text].wait_result(120)).returning == text
        async with app.worker(queues=["elsewhere", "pictures"]):
            assert (await sent["elsewhere"].wait_result(120)).queue == "elsewhere"
    assert sorted(ran) == sorted(sent)
