"""`max_time`: runs that take too long."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator

import pytest

from qtasks import ConfigurationError, Retry
from qtasks.asyncio import QueueTasks


async def test_a_coroutine_past_its_time_is_cancelled_and_fails(app: QueueTasks) -> None:
    cancelled = asyncio.Event()

    @app.task(max_time=0.05)
    async def stuck() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    async with app.worker():
        task = await stuck.add_task(timeout=120)
        assert cancelled.is_set()
    assert (task.status, task.attempt) == ("error", 1)
    assert task.error == "TimeoutError: the run took longer than max_time=0.05 s"
    assert task.traceback is not None
    assert "in stuck" in task.traceback, "it says where the time was spent"


async def test_it_is_retried_as_an_exception_is(app: QueueTasks) -> None:
    runs: list[int] = []

    @app.task(max_time=0.05, retry=1)
    async def stuck_once() -> str:
        runs.append(1)
        if len(runs) == 1:
            await asyncio.sleep(60)
        return "in time"

    async with app.worker():
        task = await stuck_once.add_task(timeout=120)
    assert (task.returning, task.attempt) == ("in time", 2)


async def test_a_thread_past_its_time_is_over_for_the_queue(app: QueueTasks) -> None:
    release, returned = threading.Event(), threading.Event()

    @app.task(max_time=0.05)
    def stuck() -> str:
        release.wait(30)
        returned.set()
        return "too late"

    @app.task()
    def fine() -> str:
        return "fine"

    async with app.worker():
        try:
            task = await stuck.add_task(timeout=120)
            assert (task.status, returned.is_set()) == ("error", False)
            assert (await fine.add_task(timeout=120)).returning == "fine"
        finally:
            release.set()
        assert await asyncio.to_thread(returned.wait, 5)
        again = await app.get_task(task.uuid)
    assert again is not None
    assert again.error == "TimeoutError: the run took longer than max_time=0.05 s"


async def test_what_ends_in_time_is_not_touched(app: QueueTasks) -> None:
    runs: list[int] = []

    @app.task(max_time=30)
    async def its_own() -> None:
        raise TimeoutError("of a server")

    @app.task(max_time=30)
    async def again() -> int:
        runs.append(1)
        if len(runs) == 1:
            raise Retry(after=0)
        return len(runs)

    @app.task(max_time=0.05)
    async def endless() -> AsyncIterator[int]:
        while True:
            await asyncio.sleep(0.01)
            yield 1

    async with app.worker():
        assert (await its_own.add_task(timeout=120)).error == "TimeoutError: of a server"
        assert (await again.add_task(timeout=120)).returning == 2
        assert (await endless.add_task(timeout=120)).status == "error"


async def test_a_run_that_is_given_back_is_no_timeout(app: QueueTasks) -> None:
    begun = asyncio.Event()

    @app.task(max_time=30)
    async def slow() -> str:
        if not begun.is_set():
            begun.set()
            await asyncio.sleep(60)
        return "second run"

    async with app:
        async with app.worker(grace=0.05):
            task = await slow.add_task()
            await begun.wait()
        async with app.worker():
            assert (await task.wait_result(120)).returning == "second run"


def test_a_time_that_never_suffices_is_refused(app: QueueTasks) -> None:
    with pytest.raises(ConfigurationError, match="max_time"):
        app.task(max_time=0)
