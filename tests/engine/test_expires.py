"""`expires`: what is of no use any more does not run."""

from __future__ import annotations

import asyncio

import pytest
from msgspec.structs import replace

import qtasks
from qtasks import ConfigurationError, Retry
from qtasks.asyncio import QueueTasks
from qtasks_core import TaskMessage


async def test_a_task_that_waited_too_long_does_not_run(app: QueueTasks) -> None:
    runs: list[str] = []

    @app.task()
    async def note(text: str) -> None:
        runs.append(text)

    async with app:
        late = await note.add_task("late", expires=0.05)
        called = await note.call("called").add_task(expires=0.05)
        in_time = await note.add_task("in time", expires=60)
        await asyncio.sleep(0.1)
        async with app.worker():
            for task in (late, called):
                ended = await task.wait_result(120)
                assert (ended.status, ended.dead) == ("error", "expired")
            assert (await in_time.wait_result(120)).status == "success"
    assert runs == ["in time"]


async def test_clocks_that_differ_are_told_of(
    app: QueueTasks, caplog: pytest.LogCaptureFixture
) -> None:
    @app.task()
    async def nothing() -> None: ...

    def sent(ahead: float) -> TaskMessage:
        message = nothing.call().message(app, expires=60)
        created = message.created_at + ahead
        return replace(message, created_at=created, expires_at=created + 60)

    async with app.worker():
        assert (await app.submit(sent(0.0), 5)).status == "success"
        assert caplog.text == ""
        late = await app.submit(sent(-100.0), 5)
        assert (late.status, late.dead) == ("error", "expired")
        assert (late.error or "").startswith("expired 40")
        assert (late.error or "").endswith("by the clock of this worker")
        for _ in range(2):
            assert (await app.submit(sent(100.0), 5)).status == "success"
    assert caplog.text.count("s ahead of this worker's: expires= is off by that") == 1


async def test_a_retry_that_comes_too_late_does_not_run(app: QueueTasks) -> None:
    runs: list[int] = []

    @app.task()
    async def again() -> None:
        runs.append(1)
        raise Retry(after=0.3)

    async with app.worker():
        task = await again.add_task(expires=0.2, timeout=120)
    assert task.dead == "expired"
    assert len(runs) <= 1, "a busy machine may not even begin the first run in time"


async def test_a_time_before_it_is_due_is_refused(app: QueueTasks) -> None:
    @app.task()
    async def nothing() -> None: ...

    async with app:
        with pytest.raises(ConfigurationError, match="expires=0"):
            await nothing.add_task(expires=0)
        with pytest.raises(ConfigurationError, match=r"due after 5\.000 s"):
            await nothing.add_task(delay=5, expires=5)


def test_blocking_callers_may_say_it_too(app: QueueTasks) -> None:
    blocking = qtasks.QueueTasks(app.name, "memory://")

    @blocking.task()
    def nothing() -> None: ...

    with blocking:
        message = nothing.call().message(blocking, expires=60)
        assert message.expires_at == message.created_at + 60
        assert nothing.add_task(expires=60).status == "new"
        assert nothing.call().add_task(expires=60).status == "new"
        with pytest.raises(ConfigurationError, match="expires=-1"):
            nothing.add_task(expires=-1)
