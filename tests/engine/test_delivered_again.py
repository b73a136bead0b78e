"""A worker recognises the message of a task that it is running: it never runs it beside itself."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from uuid import uuid4

import pytest

from qtasks import Retry
from qtasks.asyncio import QueueTasks
from qtasks_core import (
    Delivery,
    Outcome,
    QueueDepth,
    Release,
    Settlement,
    Subscription,
    TaskMessage,
)
from qtasks_memory import MemoryBroker, MemoryStorage


class Forgetful(Subscription):
    """Gives what it holds to the next receiver whenever it is to extend, as if all had been lost.

    So does a server that has closed every connection of a worker.
    """

    def __init__(self, inner: Subscription) -> None:
        self.inner = inner
        self.losses = 0
        self.forgotten = asyncio.Event()

    async def receive(self, wanted: Mapping[str, int], limit: int) -> list[Delivery]:
        return await self.inner.receive(wanted, limit)

    async def settle(self, settlements: Sequence[Settlement]) -> list[Outcome]:
        return await self.inner.settle(settlements)

    async def extend(self, deliveries: Sequence[Delivery]) -> list[Delivery | None]:
        if self.losses >= 2:
            self.forgotten.set()
            return await self.inner.extend(deliveries)
        self.losses += 1
        await self.inner.settle([Release(delivery) for delivery in deliveries])
        return [None] * len(deliveries)

    async def close(self) -> None:
        await self.inner.close()


class ForgetfulBroker(MemoryBroker):
    async def subscribe(self, queues: Mapping[str, int]) -> Subscription:
        self.subscription = Forgetful(await super().subscribe(queues))
        return self.subscription


@pytest.fixture
def broker() -> ForgetfulBroker:
    return ForgetfulBroker(uuid4().hex, lease=0.3)


@pytest.fixture
def app(broker: ForgetfulBroker) -> QueueTasks:
    return QueueTasks(broker=broker, storage=MemoryStorage(uuid4().hex))


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(120):
        while not await condition():  # noqa: ASYNC110  # it is a server's, which rings for nobody
            await asyncio.sleep(0.01)


async def emptied(broker: MemoryBroker) -> None:
    """Wait until nothing is left in the queue, or held."""
    empty = QueueDepth(ready=0, delayed=0, in_flight=0)

    async def is_empty() -> bool:
        return await broker.depth("default") == empty

    await until(is_empty)


async def test_a_task_whose_lease_was_lost_comes_back_to_its_own_run(
    app: QueueTasks, broker: ForgetfulBroker, caplog: pytest.LogCaptureFixture
) -> None:
    running = most = runs = 0

    @app.task()
    async def work() -> str:
        nonlocal running, most, runs
        running, runs = running + 1, runs + 1
        most = max(most, running)
        await broker.subscription.forgotten.wait()
        await asyncio.sleep(0.2)
        running -= 1
        return "done"

    caplog.set_level(logging.WARNING, "qtasks")
    async with app, app.worker(concurrency=5):
        task = await work.add_task(timeout=60)
        assert task.returning == "done"
        await emptied(broker)
    assert (most, runs) == (1, 1)
    assert not [r for r in caplog.records if "refused" in r.getMessage()]


async def test_a_message_that_was_published_twice_runs_once(
    app: QueueTasks, broker: ForgetfulBroker
) -> None:
    runs = 0
    go = asyncio.Event()

    @app.task(name="twice")
    async def twice() -> int:
        nonlocal runs
        runs += 1
        await go.wait()
        return runs

    async with app:
        handle = await twice.add_task()
        copy = TaskMessage(uuid=handle.uuid, task_name="twice")
        await broker.publish([copy, copy])
        async with app.worker(concurrency=5):

            async def all_are_held() -> bool:
                return (await broker.depth("default")).in_flight == 3

            await until(all_are_held)
            go.set()
            assert (await handle.wait_result(timeout=120)).returning == 1
            await emptied(broker)
    assert runs == 1


async def test_a_run_that_is_retried_goes_on_with_its_newest_delivery(
    app: QueueTasks, broker: ForgetfulBroker
) -> None:
    attempts: list[int] = []

    @app.task()
    async def work() -> int:
        attempts.append(len(attempts) + 1)
        await broker.subscription.forgotten.wait()
        if len(attempts) == 1:
            await asyncio.sleep(0.2)
            raise Retry(after=0.05)
        return len(attempts)

    async with app, app.worker(concurrency=5):
        task = await work.add_task(timeout=60)
        assert task.returning == 2
        assert task.attempt == 2
        await emptied(broker)
    assert attempts == [1, 2]
