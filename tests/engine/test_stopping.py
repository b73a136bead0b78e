"""A worker that is told to stop at an awkward moment runs nothing more and keeps nothing."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Event

import pytest

from qtasks.asyncio import QueueTasks
from qtasks.worker import worker as worker_module
from qtasks_core import Subscription, Task
from qtasks_core.errors import Closed, ConfigurationError, Unavailable
from qtasks_memory import MemoryBroker, MemoryStorage
from tests.processes import Process


class Slow(MemoryStorage):
    """Answers reads only when it is let."""

    def __init__(self) -> None:
        super().__init__("stopping")
        self.asked, self.let = Event(), Event()

    async def get(self, uuids: Sequence[str]) -> list[Task | None]:
        self.asked.set()
        while not self.let.is_set():  # noqa: ASYNC110  # set by another loop's thread
            await asyncio.sleep(0.01)
        return await super().get(uuids)


async def test_what_is_admitted_after_the_stop_is_given_back() -> None:
    storage = Slow()
    app = QueueTasks("stopping", MemoryBroker("stopping"), storage)
    runs: list[int] = []

    @app.task()
    async def never() -> None:
        runs.append(1)

    async with app:
        async with app.worker():
            await never.add_task()
            assert await asyncio.to_thread(storage.asked.wait, 5)
            asyncio.get_running_loop().call_later(0.1, storage.let.set)
        assert runs == []
        depth = await app.client.broker.depth("default")
        assert (depth.ready, depth.in_flight) == (1, 0)


class Unclosable(MemoryBroker):
    """Its server is away when a subscription is to be closed: it does not even interrupt it."""

    async def subscribe(self, queues: Mapping[str, int]) -> Subscription:
        subscription = await super().subscribe(queues)

        async def close() -> None:
            raise Unavailable("the server is away")

        subscription.close = close  # type: ignore[method-assign]
        self._subscriptions.clear()
        return subscription


async def test_a_subscription_that_cannot_be_closed_does_not_take_the_grace() -> None:
    app = QueueTasks("unclosable", Unclosable("unclosable"), MemoryStorage("unclosable"))
    begun = asyncio.Event()

    @app.task()
    async def slow() -> str:
        begun.set()
        await asyncio.sleep(0.3)
        return "finished"

    async with app:
        async with app.worker(grace=5):
            task = await slow.add_task()
            await begun.wait()
        assert (found := await app.get_task(task.uuid)) is not None
        assert found.returning == "finished"


async def test_a_function_that_outlives_its_worker_ends_unheard(
    app: QueueTasks, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(worker_module, "UNWIND_WITHIN", 0.1)
    begun, go_on, ended = asyncio.Event(), asyncio.Event(), asyncio.Event()

    @app.task()
    async def stubborn() -> None:
        begun.set()
        while not go_on.is_set():
            try:
                await go_on.wait()
            except asyncio.CancelledError:
                continue
        ended.set()

    async with app:
        async with app.worker(grace=0.05):
            await stubborn.add_task()
            await begun.wait()
        go_on.set()
        with caplog.at_level(logging.ERROR, "asyncio"):
            await ended.wait()
            await asyncio.sleep(0.1)
        assert [r.getMessage() for r in caplog.records if r.name == "asyncio"] == []


CLOSED = """
import asyncio
from qtasks.asyncio import QueueTasks
app = QueueTasks("closed")
runs = []

@app.task()
async def work() -> int:
    runs.append(1)
    if len(runs) == 1:
        begun.set()
        await asyncio.sleep(60)
    return len(runs)

async def host():
    global begun, task, worker
    begun = asyncio.Event()
    worker = app.worker()
    await worker.__aenter__()
    task = await work.add_task()
    await begun.wait()

async def another():
    async with app.worker(concurrency=1):
        print("runs:", (await task.wait_result(20)).returning)

loop = asyncio.new_event_loop()
loop.run_until_complete(host())
loop.close()
asyncio.run(another())
"""


def test_a_worker_whose_loop_was_closed_under_it_gives_back(tmp_path: Path) -> None:
    """Nobody is left who would stop it, and leases are kept beside that loop."""
    (tmp_path / "closed.py").write_text(CLOSED)
    environment = {"QTASKS_BROKER_URL": f"sqlite:///{tmp_path}/closed.db?lease=60"}
    with Process("closed.py", environment=environment, cwd=tmp_path) as process:
        process.wait_for("runs: 2")


async def test_a_part_that_cannot_stop_leaves_no_wait_and_no_other_part() -> None:
    class Stuck(MemoryBroker):
        async def stop(self) -> None:
            await super().stop()
            raise Unavailable("the server is away")

    storage = MemoryStorage("stuck")
    app = QueueTasks("stuck", Stuck("stuck"), storage)

    @app.task()
    async def never() -> None: ...

    await app.start()
    task = await never.add_task()
    waiting = asyncio.create_task(task.wait_result(120))
    await asyncio.sleep(0.05)
    with pytest.raises(Unavailable):
        await app.stop()
    with pytest.raises(Closed):
        await waiting
    with pytest.raises(Closed):
        await storage.get([task.uuid])


@pytest.mark.parametrize("delay", [float("inf"), float("nan")])
async def test_a_delay_that_is_no_number_of_seconds_is_refused(
    app: QueueTasks, delay: float
) -> None:
    """Else nan ran at once, and a server's complaint failed all that was enqueued beside it."""

    @app.task()
    async def never() -> None: ...

    async with app:
        with pytest.raises(ConfigurationError, match="delay="):
            await never.add_task(delay=delay)
