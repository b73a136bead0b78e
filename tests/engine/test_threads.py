"""The threads in which plain functions run: as many as there are runs, gone when there are none."""

from __future__ import annotations

import asyncio
import threading

import pytest

from qtasks.asyncio import QueueTasks
from qtasks.execution import threads
from qtasks.execution.threads import busy_threads, in_thread
from tests.processes import until


async def test_each_call_has_one_at_once_and_they_are_used_again() -> None:
    together = threading.Barrier(20)
    first = await asyncio.gather(*(in_thread(lambda: together.wait(10)) for _ in range(20)))
    assert sorted(first) == list(range(20))
    seen = {await in_thread(threading.get_ident) for _ in range(50)}
    assert len(seen) <= 20
    assert busy_threads() == 0


async def test_without_work_they_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "REST", 0.02)
    here = [await in_thread(threading.current_thread) for _ in range(3)]
    # One that rested before waits for as long as it was told then.
    await asyncio.to_thread(until, lambda: not any(t.is_alive() for t in here), "their end")
    assert await in_thread(lambda: "again") == "again"


async def test_one_that_never_returns_keeps_no_place(app: QueueTasks) -> None:
    release = threading.Event()

    @app.task(max_time=0.05)
    def stuck() -> None:
        release.wait(30)

    @app.task()
    def fine() -> int:
        return 1

    try:
        async with app.worker(concurrency=1):
            for _ in range(3):
                assert (await stuck.add_task(timeout=120)).status == "error"
            assert (await fine.add_task(timeout=120)).returning == 1
        assert busy_threads() == 3
    finally:
        release.set()
    await asyncio.to_thread(until, lambda: busy_threads() == 0, "their end")
