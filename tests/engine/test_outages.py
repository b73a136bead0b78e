"""A server that is out of reach while a worker holds tasks: none of them is run twice for that."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from threading import Event
from typing import Any

import pytest

from qtasks.asyncio import QueueTasks
from qtasks.worker import heartbeat
from qtasks_core import Command, Delivery, Subscription, Task
from qtasks_core.errors import Unavailable
from qtasks_memory import MemoryBroker, MemoryStorage

LEASE = 0.6


class Down(MemoryStorage):
    """Refuses reads while `down`, and says that it was asked."""

    def __init__(self) -> None:
        super().__init__("outages")
        self.down = False
        self.asked = Event()

    async def get(self, uuids: Sequence[str]) -> list[Task | None]:
        if self.down:
            self.asked.set()
            raise Unavailable("the storage is away")
        return await super().get(uuids)


@pytest.fixture
def storage() -> Down:
    return Down()


@pytest.fixture
def app(storage: Down) -> QueueTasks:
    return QueueTasks("outages", MemoryBroker("outages", lease=LEASE), storage)


async def deliveries(app: QueueTasks, within: float) -> list[Any]:
    """Return what another receiver gets."""
    subscription = await app.client.broker.subscribe({"default": 10})
    try:
        async with asyncio.timeout(within):
            return await subscription.receive({"default": 10}, 10)
    except TimeoutError:
        return []
    finally:
        await subscription.close()


async def until_noted(app: QueueTasks, uuid: str) -> None:
    async with asyncio.timeout(120):
        while (  # noqa: ASYNC110  # nothing tells of it
            task := await app.get_task(uuid)
        ) is None or task.status != "process":
            await asyncio.sleep(0.01)


async def test_a_running_task_keeps_its_lease(
    app: QueueTasks, storage: Down, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heartbeat, "NOTE_AFTER", 0.01)
    go_on = asyncio.Event()

    @app.task()
    async def long() -> str:
        await go_on.wait()
        return "once"

    async with app, app.worker(concurrency=1, grace=1):
        task = await long.add_task()
        await until_noted(app, task.uuid)
        storage.down = True
        assert await asyncio.to_thread(storage.asked.wait, 5)
        assert await deliveries(app, 3 * LEASE) == []
        storage.down = False
        go_on.set()
        assert (await task.wait_result(120)).returning == "once"


async def test_what_was_received_keeps_its_lease_until_it_can_be_admitted(
    app: QueueTasks, storage: Down
) -> None:
    runs: list[int] = []

    @app.task()
    async def short(n: int) -> None:
        runs.append(n)

    async with app, app.worker(concurrency=2):
        storage.down = True
        tasks = await short.map([(1,), (2,)])
        assert await asyncio.to_thread(storage.asked.wait, 5)
        assert await deliveries(app, 3 * LEASE) == []
        storage.down = False
        for task in tasks:
            await task.wait_result(120)
    assert sorted(runs) == [1, 2]


async def test_a_cancel_that_cannot_be_looked_up_does_not_hold_up_other_commands(
    app: QueueTasks, storage: Down, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "qtasks")
    begun, stopped = asyncio.Event(), asyncio.Event()

    @app.task()
    async def long() -> None:
        begun.set()
        try:
            await asyncio.sleep(60)
        finally:
            stopped.set()

    async def tell(name: str, target: str | None) -> None:
        await app.control(lambda c: c.broker.broadcast(Command(name=name, target=target)))

    async with app, app.worker(grace=1):
        task = await long.add_task()
        await begun.wait()
        storage.down = True
        await tell("cancel", task.uuid)
        assert await asyncio.to_thread(storage.asked.wait, 5)
        await tell("pause", "default")
        async with asyncio.timeout(120):
            while "paused queues: default" not in caplog.text:  # noqa: ASYNC110  # a log
                await asyncio.sleep(0.01)
        storage.down = False
        assert await task.cancel()
        async with asyncio.timeout(120):
            await stopped.wait()


async def test_a_timeout_that_a_part_raises_is_an_error_of_its_own() -> None:
    """Taken for the worker's own it was repeated without a pause, and nobody told."""

    class Timing(MemoryBroker):
        async def subscribe(self, queues: Mapping[str, int]) -> Subscription:
            subscription = await super().subscribe(queues)

            async def receive(wanted: Mapping[str, int], limit: int) -> list[Delivery]:
                raise TimeoutError("of the driver")

            subscription.receive = receive  # type: ignore[method-assign]
            return subscription

    app = QueueTasks("timing", Timing("timing"), MemoryStorage("timing"))
    with pytest.raises(TimeoutError, match="of the driver"):
        async with app.worker() as worker:
            await asyncio.wait_for(asyncio.shield(worker.failed), 5)
