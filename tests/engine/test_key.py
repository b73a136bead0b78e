"""`key=`: calls that share one are one task, whoever makes them and however often."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

import qtasks
from qtasks import ConfigurationError, Refused, TaskFailed, TaskTimeout, Unavailable
from qtasks.asyncio import QueueTasks
from qtasks_core import Outcome, TaskMessage
from qtasks_memory import MemoryBroker
from tests.processes import Process


@pytest.fixture(params=["memory", "sqlite", "sqlite+memory"])
async def apps(
    request: pytest.FixtureRequest, tmp_path: Path
) -> AsyncIterator[tuple[QueueTasks, QueueTasks]]:
    """Two clients of one app, on a pair in one transaction and on others."""
    urls = {"memory": "memory://?lease=5", "sqlite": f"sqlite:///{tmp_path}/key.db?lease=5"}
    broker, _, storage = request.param.partition("+")
    name = f"key-{uuid4().hex[:8]}"
    one, two = (QueueTasks(name, urls[broker], urls[storage or broker]) for _ in range(2))
    async with one, two:
        yield one, two


async def test_the_second_call_is_the_first_task(apps: tuple[QueueTasks, QueueTasks]) -> None:
    app, other = apps
    ran: list[int] = []

    @app.task()
    async def add(x: int, y: int) -> int:
        ran.append(x)
        return x + y

    @app.task()
    async def subtract(x: int, y: int) -> int:
        return x - y

    first = await add.add_task(1, 2, key="order 7")
    again = await add.using(other).add_task(10, 20, key="order 7")
    assert (again.uuid, again.args, again.status) == (first.uuid, [1, 2], "new")
    others = [await add.add_task(3, 4, key="order 8"), await subtract.add_task(5, 6, key="order 7")]
    assert len({first.uuid, *(task.uuid for task in others)}) == 3
    async with app.worker():
        ends = [await task.wait_result(120) for task in (first, again, *others)]
    assert [task.returning for task in ends] == [3, 3, 7, -1]
    assert sorted(ran) == [1, 3]


async def test_whoever_waits_gets_the_end(apps: tuple[QueueTasks, QueueTasks]) -> None:
    """The final record is sent to one client's address: the others watch the task."""
    app, other = apps
    ran = 0

    @app.task()
    async def count() -> int:
        nonlocal ran
        ran += 1
        return ran

    await count.add_task(key="k")
    calls = [count.using(client).add_task(key="k", timeout=120) for client in (app, other) * 3]
    waiting = asyncio.gather(*calls)
    async with app.worker():
        ends = await waiting
    assert [task.returning for task in ends] == [1] * 6


async def test_what_has_ended_is_returned_at_once(apps: tuple[QueueTasks, QueueTasks]) -> None:
    app, other = apps

    @app.task()
    async def divide(x: int, y: int) -> float:
        return x / y

    async with app.worker():
        await divide.add_task(6, 3, key="fine", timeout=120)
        with pytest.raises(TaskFailed):
            _ = (await divide.add_task(1, 0, key="wrong", timeout=120)).returning
    for client in (app, other):
        for timeout in (None, 10.0):
            fine = await divide.using(client).add_task(6, 3, key="fine", timeout=timeout)
            assert (fine.status, fine.returning) == ("success", 2.0)
        # The key of a failed task is taken too.
        wrong = await divide.using(client).add_task(1, 1, key="wrong", timeout=120)
        with pytest.raises(TaskFailed, match="division by zero"):
            _ = wrong.returning


async def test_the_timeout_is_the_callers_own(apps: tuple[QueueTasks, QueueTasks]) -> None:
    app, other = apps

    @app.task()
    async def add(x: int, y: int) -> int:
        return x + y

    task = await add.add_task(1, 2, key="k")
    with pytest.raises(TaskTimeout, match=task.uuid):
        await add.using(other).add_task(1, 2, key="k", timeout=0.2)
    async with app.worker():
        assert (await add.using(other).add_task(1, 2, key="k", timeout=120)).returning == 3


async def test_many_at_once_from_two_clients(apps: tuple[QueueTasks, QueueTasks]) -> None:
    """Calls with and without a key share batches; each key is run once."""
    app = apps[0]
    ran: list[int] = []

    @app.task()
    async def note(n: int) -> None:
        ran.append(n)
        await asyncio.sleep(0.01)

    async with app.worker(concurrency=20):
        calls = [
            note.using(client).add_task(n, key=None if n < 0 else str(n), timeout=120)
            for n in (1, -1, 2, -1) * 25
            for client in apps
        ]
        ends = await asyncio.gather(*calls)
    assert {task.status for task in ends} == {"success"}
    assert sorted(n for n in ran if n > 0) == [1, 2]
    assert ran.count(-1) == 100


async def test_the_blocking_face_and_retries(tmp_path: Path) -> None:
    app = qtasks.QueueTasks("key", f"sqlite:///{tmp_path}/key.db")
    ran: list[int] = []

    @app.task(retry=1)
    def add(x: int, y: int) -> int:
        ran.append(x)
        if len(ran) == 1:
            raise qtasks.Retry(after=0.05)
        return x + y

    def enqueue() -> None:
        with app:
            first = add.add_task(1, 2, key="k", delay=0.1)
            assert first.status == "scheduled"
            assert add.call(1, 2).add_task(key="k", timeout=120).returning == 3
            assert add.add_task(1, 2, key="k").uuid == first.uuid

    async with app.worker():
        await asyncio.to_thread(enqueue)
    assert ran == [1, 1]


@pytest.mark.parametrize("key", ["", 7, "a\0b", "\ud800"], ids=ascii)
async def test_a_key_that_is_no_text_is_refused(app: QueueTasks, key: Any) -> None:
    @app.task()
    async def add(x: int, y: int) -> int:
        return x + y

    with pytest.raises(ConfigurationError, match=re.escape(f"key={key!r} is no text, or empty")):
        await add.add_task(1, 2, key=key)


async def test_a_refused_key_stays_free() -> None:
    class Full(MemoryBroker):
        full = True

        async def publish(
            self, messages: Sequence[TaskMessage], transaction: object | None = None
        ) -> list[Outcome]:
            if self.full:
                return [Outcome("refused", "the queue is full")] * len(messages)
            return await super().publish(messages, transaction)

    broker = Full()
    async with QueueTasks(f"key-{uuid4().hex[:8]}", broker, "memory://") as app:

        @app.task()
        async def add(x: int, y: int) -> int:
            return x + y

        with pytest.raises(Refused, match="the queue is full"):
            await add.add_task(1, 2, key="k")
        broker.full = False
        async with app.worker():
            assert (await add.add_task(1, 2, key="k", timeout=120)).returning == 3


class Doubtful(MemoryBroker):
    """Publishes, and for some time says that it cannot tell."""

    doubts = 0

    async def publish(
        self, messages: Sequence[TaskMessage], transaction: object | None = None
    ) -> list[Outcome]:
        outcomes = await super().publish(messages, transaction)
        if self.doubts > 0:
            self.doubts -= 1
            raise Unavailable("the connection was reset")
        return outcomes


@pytest.mark.parametrize("deadline", [None, 0.0])
async def test_a_publish_of_unknown_outcome_is_repeated_and_runs_once(
    deadline: float | None,
) -> None:
    """By the engine while there is time, then by the caller: each time it is another message."""
    broker = Doubtful()
    ran: list[str] = []
    async with QueueTasks(f"key-{uuid4().hex[:8]}", broker, "memory://") as app:

        @app.task()
        async def note(text: str) -> None:
            ran.append(text)

        broker.doubts = 3
        if deadline is not None:
            for _ in range(3):
                with pytest.raises(Unavailable, match="submitting with the same key again is safe"):
                    await note.add_task("keyed", key="k", timeout=deadline)
        task = await note.add_task("keyed", key="k")
        await note.add_task("last")
        depth = await app.client.broker.depth("default")
        assert depth.ready is not None
        assert depth.ready >= 5, "four messages of one task, and the last"
        async with app.worker(concurrency=1):
            await task.wait_result(120)
            async with asyncio.timeout(120):
                while "last" not in ran:  # noqa: ASYNC110  # nothing tells of it
                    await asyncio.sleep(0.01)
    assert ran == ["keyed", "last"]


ENQUEUE = """
import sys
from qtasks import QueueTasks

app = QueueTasks("key", sys.argv[1])

@app.task(name="note")
def note(who: str) -> None: ...

with app:
    for at in range(50):
        assert note.add_task(sys.argv[2], key=str(at)).uuid == app.uuid_of("note", str(at))
"""


async def test_across_processes(tmp_path: Path) -> None:
    """Three processes enqueue the same 50 keys while a worker runs them: 50 runs."""
    url = f"sqlite:///{tmp_path}/key.db"
    app = QueueTasks("key", url)
    ran: list[str] = []

    @app.task(name="note")
    async def note(who: str) -> None:
        ran.append(who)

    async with app.worker():
        with (
            Process("-c", ENQUEUE, url, "a", environment={}) as a,
            Process("-c", ENQUEUE, url, "b", environment={}) as b,
            Process("-c", ENQUEUE, url, "c", environment={}) as c,
        ):
            assert [await asyncio.to_thread(each.wait) for each in (a, b, c)] == [0, 0, 0]
        for at in range(50):
            await note.add_task("late", key=str(at), timeout=120)
    assert len(ran) == 50
    assert "late" not in ran
