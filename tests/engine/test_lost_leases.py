"""What a worker says of a lease that is lost, and of an end that is refused."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from threading import Event
from uuid import uuid4

import pytest
from msgspec.structs import replace

from qtasks.asyncio import QueueTasks
from qtasks_core import Delivery, Outcome, Settlement, Subscription, Task
from qtasks_core.records import FINAL
from qtasks_memory import MemoryBroker, MemoryStorage
from qtasks_memory.subscription import MemorySubscription
from tests.processes import until


class SlowToAnswer(MemoryBroker):
    """Settles at once, and answers only after the next extension of the leases."""

    async def subscribe(self, queues):  # type: ignore[no-untyped-def]
        return SlowSubscription(await super().subscribe(queues))


class SlowSubscription(Subscription):
    def __init__(self, inner: Subscription) -> None:
        self._inner = inner

    async def receive(self, queues, limit):  # type: ignore[no-untyped-def]
        return await self._inner.receive(queues, limit)

    async def settle(self, settlements: Sequence[Settlement]) -> list[Outcome]:
        settled = await self._inner.settle(settlements)
        await asyncio.sleep(0.5)  # the answer is on its way
        return settled

    async def extend(self, deliveries: Sequence[Delivery]) -> list[Delivery | None]:
        return await self._inner.extend(deliveries)

    async def close(self) -> None:
        await self._inner.close()


async def test_what_is_being_settled_is_not_said_to_have_lost_its_lease(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING)
    name = uuid4().hex
    app = QueueTasks(broker=SlowToAnswer(name, lease=0.3), storage=MemoryStorage(name))

    @app.task()
    async def short() -> None:
        pass

    async with app, app.worker():
        handles = await short.map([() for _ in range(20)])
        for handle in handles:
            await handle.wait_result(timeout=120)
    assert "lease was lost" not in caplog.text


class StolenFrom(MemoryBroker):
    """Lets another receiver take what is to be extended; is that answered, the lease is lost."""

    def __init__(self, name: str, *, answered: bool) -> None:
        super().__init__(name, lease=0.3)
        self._answered = answered
        self.stolen = Event()

    async def subscribe(self, queues):  # type: ignore[no-untyped-def]
        subscription = await super().subscribe(queues)
        other = MemorySubscription(self._started(), 60.0)
        extend = subscription.extend

        async def late(deliveries: Sequence[Delivery]) -> list[Delivery | None]:
            if not self.stolen.is_set():
                await other.receive({"default": 1}, 1)
                self.stolen.set()
            if not self._answered:
                await asyncio.Event().wait()
            return await extend(deliveries)

        subscription.extend = late  # type: ignore[method-assign]
        return subscription


async def test_a_lease_that_another_has_is_said_to_be_lost(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING)
    name = uuid4().hex
    app = QueueTasks(broker=StolenFrom(name, answered=True), storage=MemoryStorage(name))
    go_on = asyncio.Event()

    @app.task()
    async def long() -> None:
        await go_on.wait()

    async with app, app.worker(concurrency=1):  # else it takes its own again
        handle = await long.add_task()
        await asyncio.to_thread(until, lambda: "was lost" in caplog.text, "the lost lease")
        go_on.set()
        assert (await handle.wait_result(120)).status == "success"
    assert f"{handle.uuid}: the lease was lost; another worker may run it" in caplog.text


async def test_a_retry_that_comes_after_the_lease_is_not_said_to_lose_to_another_run(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING)
    name = uuid4().hex
    broker = StolenFrom(name, answered=False)
    app = QueueTasks(broker=broker, storage=MemoryStorage(name))

    @app.task(retry=1)
    async def fails() -> None:
        await asyncio.to_thread(broker.stolen.wait, 10)
        raise ValueError("too late")

    async with app, app.worker(concurrency=1):  # else it takes its own again
        await fails.add_task()
        await asyncio.to_thread(until, lambda: "was lost" in caplog.text, "the lost lease")
    assert "its message was not settled (the lease was lost); it may run again" in caplog.text
    assert "another run of it counts" not in caplog.text


class Beaten(MemoryStorage):
    """Another run records each end first."""

    async def save(self, tasks: Sequence[Task], transaction: object | None = None) -> list[Outcome]:
        await super().save([replace(t, execution="theirs") for t in tasks if t.status in FINAL])
        return await super().save(tasks, transaction)


async def test_an_end_that_another_run_has_recorded_is_said_to_be_refused(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING)
    name = uuid4().hex
    app = QueueTasks(broker=MemoryBroker(name), storage=Beaten(name))

    @app.task()
    async def short() -> None:
        pass

    async with app, app.worker():
        assert (await short.add_task(timeout=120)).status == "success"
    assert (
        "its result was refused (a newer record is there); the result of another run counts"
        in caplog.text
    )
