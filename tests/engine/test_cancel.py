"""Cancelling: what waits never runs, what runs is stopped, what has ended stays as it ended."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from uuid import uuid4

import pytest

import qtasks
from qtasks import TaskCancelled
from qtasks.asyncio import QueueTasks
from qtasks.bridge.crossing import io_thread
from qtasks_core import Command, Composition, Delivery, Storage, Subscription, Task, Verdict
from qtasks_core.errors import NotSupported, UnknownTask
from qtasks_core.separate import SeparateComposition
from qtasks_memory import MemoryBroker, MemoryStorage


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
        await note.add_task("other", timeout=120)
        ended = await cancelled.wait_result(timeout=120)
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
        await asyncio.wait_for(begun.wait(), 120)
        assert await task.cancel()
        await asyncio.wait_for(stopped.wait(), 120)
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
        task = await one.add_task(timeout=120)
        assert not await task.cancel()
        assert (await task.wait_result(timeout=120)).returning == 1
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
            await asyncio.wait_for(begun.wait(), 120)
            assert await task.cancel()
            await asyncio.wait_for(stopped.wait(), 120)


async def test_who_waits_hears_of_it(app: QueueTasks) -> None:
    @app.task()
    async def work() -> None: ...

    async with app:
        task = await work.add_task(delay=60)
        waiting = asyncio.create_task(task.wait_result(120))
        await asyncio.sleep(0)
        assert await task.cancel()
        assert (await waiting).status == "cancel"


async def test_with_a_broadcast_it_is_stopped_at_once(app: QueueTasks) -> None:
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
        # By the command; leases are extended, and records read, after 10 s.
        async with asyncio.timeout(5):
            await stopped.wait()
    async with app:
        found = await app.get_task(task.uuid)
        assert found is not None
        assert found.status == "cancel"


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
            assert (await task.wait_result(120)).status == "cancel"
        before = len(runs)
        await asyncio.sleep(1.2)
        assert len(runs) == before


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
        assert (await task.wait_result(120)).returning == "done"


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


class OnItsWay(MemoryBroker):
    """Its deliveries take their time to the worker. Their records are looked at before that."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.taken, self.arrive = asyncio.Event(), asyncio.Event()

    async def subscribe(self, queues: Mapping[str, int]) -> Subscription:
        subscription = await super().subscribe(queues)
        receive = subscription.receive

        async def received(wanted: Mapping[str, int], limit: int) -> list[Delivery]:
            deliveries = await receive(wanted, limit)
            self.taken.set()
            await self.arrive.wait()
            return deliveries

        subscription.receive = received  # type: ignore[method-assign]
        return subscription

    def join(self, storage: Storage) -> Composition | None:
        return Early(self, storage)


class Early(SeparateComposition):
    async def admit(self, deliveries: Sequence[Delivery]) -> list[tuple[Verdict, Task | None]]:
        return [("run", None) for _ in deliveries]


async def test_a_command_that_comes_before_the_delivery_is_obeyed_all_the_same() -> None:
    name = uuid4().hex
    broker = OnItsWay(name)
    app = QueueTasks(name, broker, MemoryStorage(name))
    begun, stopped = asyncio.Event(), asyncio.Event()

    @app.task()
    async def work() -> None:
        begun.set()
        try:
            await asyncio.sleep(600)
        finally:
            stopped.set()

    async with app, app.worker():
        task = await work.add_task()
        await until(broker.taken.is_set)
        assert await task.cancel()
        io_thread().post(broker.arrive.set)
        # Records are read every 10 s.
        async with asyncio.timeout(7):
            await begun.wait()
            await stopped.wait()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(120):
        while not condition():  # noqa: ASYNC110  # it is of another loop
            await asyncio.sleep(0.01)
