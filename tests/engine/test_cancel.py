"""Cancelling: what is queued never runs, what runs is stopped, both are `cancel` for everybody."""

from __future__ import annotations

import asyncio
import threading

import pytest

from qtasks import TaskCancelled, UnknownTask
from qtasks import blocking as blocking_face
from qtasks.asyncio import QueueTasks
from qtasks_core import Command
from qtasks_core.errors import NotSupported
from qtasks_memory import MemoryBroker, MemoryStorage


async def test_a_queued_task_never_runs(app: QueueTasks) -> None:
    runs: list[int] = []

    @app.task()
    async def work(number: int) -> int:
        runs.append(number)
        return number

    async with app:
        task = await work.add_task(1)
        assert await app.cancel(task.uuid)
        async with app.worker():
            assert (await work.add_task(2, timeout=5)).returning == 2
        found = await app.get_task(task.uuid)
        assert found is not None
        assert found.status == "cancel"
        with pytest.raises(TaskCancelled, match=task.uuid):
            _ = found.returning
        assert runs == [2]
        assert (await app.client.broker.depth("default")).in_flight in (0, None)


async def test_who_waits_hears_of_it(app: QueueTasks) -> None:
    @app.task()
    async def work() -> None: ...

    async with app:
        task = await work.add_task(delay=60)
        waiting = asyncio.create_task(task.wait_result(5))
        await asyncio.sleep(0)
        assert await task.cancel()
        assert (await waiting).status == "cancel"


async def test_a_running_coroutine_is_cancelled_at_once(app: QueueTasks) -> None:
    begun, stopped = asyncio.Event(), asyncio.Event()

    @app.task()
    async def work() -> None:
        begun.set()
        try:
            await asyncio.sleep(60)
        finally:
            stopped.set()

    async with app.worker():
        task = await work.add_task()
        await begun.wait()
        assert await task.cancel()
        # By the command; leases are extended, and records read, later.
        async with asyncio.timeout(0.3):
            await stopped.wait()
    async with app:
        found = await app.get_task(task.uuid)
        assert found is not None
        assert found.status == "cancel"


class Silent(MemoryBroker):
    """Has no way to broadcast."""

    async def broadcast(self, command: Command) -> None:
        raise NotSupported("no channel")

    def commands(self):  # type: ignore[no-untyped-def]
        raise NotSupported("no channel")


async def test_without_a_broadcast_the_worker_finds_out() -> None:
    app = QueueTasks("silent", Silent("silent", lease=0.6), MemoryStorage("silent"))
    begun, stopped = asyncio.Event(), asyncio.Event()

    @app.task()
    async def work() -> None:
        begun.set()
        try:
            await asyncio.sleep(60)
        finally:
            stopped.set()

    async with app.worker():
        task = await work.add_task()
        await begun.wait()
        assert await task.cancel()
        async with asyncio.timeout(2):
            await stopped.wait()


async def test_of_a_function_in_a_thread_the_result_is_dropped(app: QueueTasks) -> None:
    begun, go_on = threading.Event(), threading.Event()

    @app.task()
    def work() -> str:
        begun.set()
        go_on.wait(10)
        return "too late"

    async with app.worker():
        task = await work.add_task()
        await asyncio.to_thread(begun.wait, 5)
        assert await task.cancel()
        go_on.set()
    async with app:
        found = await app.get_task(task.uuid)
        assert found is not None
        assert (found.status, found.record.returning) == ("cancel", None)


async def test_a_task_between_two_attempts_is_not_tried_again(app: QueueTasks) -> None:
    runs: list[int] = []

    @app.task(retry=5)
    async def work() -> None:
        runs.append(1)
        raise ValueError

    async with app.worker():
        task = await work.add_task()
        while (await app.get(task.uuid)).status != "retry":  # type: ignore[union-attr]  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        if await task.cancel():
            assert (await task.wait_result(5)).status == "cancel"
        before = len(runs)
        await asyncio.sleep(1.2)
        assert len(runs) == before


async def test_what_has_ended_cannot_be_cancelled(app: QueueTasks) -> None:
    @app.task()
    async def work() -> int:
        return 1

    async with app.worker():
        task = await work.add_task(timeout=5)
        assert not await task.cancel()
        found = await app.get_task(task.uuid)
        assert found is not None
        assert found.returning == 1
        with pytest.raises(UnknownTask, match="no record of a task nobody"):
            await app.cancel("nobody")


async def test_a_command_alone_cancels_nothing(app: QueueTasks) -> None:
    """The record decides: else a stray command could lose a task."""
    begun, go_on = asyncio.Event(), asyncio.Event()

    @app.task()
    async def work() -> str:
        begun.set()
        await go_on.wait()
        return "done"

    async with app.worker():
        task = await work.add_task()
        await begun.wait()
        await app.control(
            lambda client: client.broker.broadcast(Command(name="cancel", target=task.uuid))
        )
        await asyncio.sleep(0.2)
        go_on.set()
        assert (await task.wait_result(5)).returning == "done"


def test_the_blocking_face() -> None:
    app = blocking_face.QueueTasks("cancel-blocking", "memory://")

    @app.task()
    def work() -> None: ...

    with app:
        one, two = work.add_task(), work.add_task()
        assert one.cancel()
        assert app.cancel(two.uuid)
        assert two.wait_result(5).status == "cancel"
