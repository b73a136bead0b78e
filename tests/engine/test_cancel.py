"""Cancelling: what waits never runs, what runs is stopped, what has ended stays as it ended."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from uuid import uuid4

import pytest

import qtasks
from qtasks import TaskCancelled
from qtasks.asyncio import QueueTasks
from qtasks_core import Command
from qtasks_core.errors import NotSupported, UnknownTask
from qtasks_memory import MemoryBroker


@pytest.fixture(params=["memory", "sqlite"])
async def app(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[QueueTasks]:
    urls = {"memory": "memory://?lease=1", "sqlite": f"sqlite:///{tmp_path}/cancel.db?lease=1"}
    async with QueueTasks(f"cancel-{uuid4().hex[:8]}", urls[request.param]) as app:
        yield app


async def test_what_waits_never_runs(app: QueueTasks) -> None:
    ran: list[str] = []

    @app.task()
    async def note(name: str) -> None:
        ran.append(name)

    cancelled = await note.add_task("cancelled")
    assert await cancelled.cancel()
    assert await app.cancel(cancelled.uuid), "a second time it is cancelled still"
    async with app.worker():
        await note.add_task("other", timeout=10)
        ended = await cancelled.wait_result(timeout=10)
    assert ran == ["other"]
    assert ended.status == "cancel"
    with pytest.raises(TaskCancelled):
        _ = ended.returning


async def test_an_async_function_that_runs_is_cancelled(app: QueueTasks) -> None:
    begun, stopped = asyncio.Event(), asyncio.Event()

    @app.task()
    async def forever() -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            stopped.set()

    async with app.worker():
        task = await forever.add_task()
        await asyncio.wait_for(begun.wait(), 10)
        assert await task.cancel()
        await asyncio.wait_for(stopped.wait(), 10)
    found = await app.get_task(task.uuid)
    assert found is not None
    assert found.status == "cancel"


async def test_of_a_thread_the_result_is_dropped(app: QueueTasks) -> None:
    begun, finish = threading.Event(), threading.Event()

    @app.task()
    def slow() -> int:
        begun.set()
        finish.wait(20)
        return 7

    async with app.worker():
        task = await slow.add_task()
        assert await asyncio.to_thread(begun.wait, 10)
        assert await task.cancel()
        finish.set()
    found = await app.get_task(task.uuid)
    assert found is not None
    assert found.status == "cancel"


async def test_what_has_ended_stays_as_it_ended(app: QueueTasks) -> None:
    @app.task()
    async def one() -> int:
        return 1

    async with app.worker():
        task = await one.add_task(timeout=10)
        assert not await task.cancel()
        assert (await task.wait_result(timeout=10)).returning == 1
    with pytest.raises(UnknownTask):
        await app.cancel(uuid4())


async def test_without_a_broadcast_the_worker_finds_out_by_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def mute(self: MemoryBroker, command: Command) -> None:
        raise NotSupported("no channel")

    monkeypatch.setattr(MemoryBroker, "broadcast", mute)
    begun, stopped = asyncio.Event(), asyncio.Event()
    async with QueueTasks(f"cancel-{uuid4().hex[:8]}", "memory://?lease=1") as app:

        @app.task()
        async def forever() -> None:
            begun.set()
            try:
                await asyncio.Event().wait()
            finally:
                stopped.set()

        async with app.worker():
            task = await forever.add_task()
            await asyncio.wait_for(begun.wait(), 10)
            assert await task.cancel()
            await asyncio.wait_for(stopped.wait(), 10)


def test_the_blocking_face_cancels_too(tmp_path: Path) -> None:
    with qtasks.QueueTasks("cancel-blocking", f"sqlite:///{tmp_path}/cancel.db") as app:

        @app.task()
        def one() -> int:
            return 1

        task = one.add_task()
        assert task.cancel()
        assert app.cancel(task.uuid)
        with pytest.raises(TaskCancelled):
            _ = task.wait_result(timeout=10).returning
