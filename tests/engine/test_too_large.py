"""What a storage does not take for its size: the task has a result all the same."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from uuid import uuid4

import pytest
from msgspec.structs import replace

from qtasks import PayloadTooLarge
from qtasks.asyncio import QueueTasks
from qtasks_core import Delivery, Guarantees, Outcome, Settlement, Subscription, Task
from qtasks_core.wire import encode_task
from qtasks_memory import MemoryBroker, MemoryStorage

LARGEST = 20_000


class SmallStorage(MemoryStorage):
    """Takes no record over `LARGEST` bytes, and says so beforehand if `told`."""

    told = False

    @property
    def guarantees(self) -> Guarantees:
        return replace(super().guarantees, largest=LARGEST if self.told else None)

    async def save(self, tasks: Sequence[Task], transaction: object | None = None) -> list[Outcome]:
        outcomes = []
        for task in tasks:
            if len(encode_task(task)) > LARGEST:
                outcomes.append(Outcome("refused", f"over the limit of {LARGEST} bytes"))
            else:
                outcomes += await super().save([task], transaction)
        return outcomes


class ToldStorage(SmallStorage):
    told = True


def app_with(storage: type[SmallStorage]) -> QueueTasks:
    name = uuid4().hex
    return QueueTasks(broker=MemoryBroker(name), storage=storage(name))


@pytest.mark.parametrize("storage", [SmallStorage, ToldStorage])
async def test_a_result_over_the_limit_is_an_error_and_harms_no_neighbour(
    storage: type[SmallStorage],
) -> None:
    app = app_with(storage)

    @app.task()
    async def echo(text: str) -> str:
        return text

    async with app, app.worker():
        texts = ["a", "b" * 12_000, "c"]  # arguments and result together are over it
        handles = await echo.map([(text,) for text in texts])
        ended = [await handle.wait_result(timeout=20) for handle in handles]
        assert [task.status for task in ended] == ["success", "error", "success"]
        assert "too large" in str(ended[1].error)
        assert ended[1].dead == "unstorable result"
        assert str(LARGEST) in str(ended[1].error)
        depth = await app.broker.depth("default")
        assert not depth.ready
        assert not depth.in_flight


async def test_a_retry_whose_record_is_over_the_limit_runs_again() -> None:
    app = app_with(SmallStorage)
    runs = 0

    @app.task(retry=1)
    async def fails(text: str) -> str:
        nonlocal runs
        runs += 1
        if runs == 1:
            raise ValueError("x" * 30_000)
        return "done"

    async with app, app.worker():
        task = await fails.add_task("a", timeout=20)
    assert task.returning == "done"
    assert runs == 2


async def test_arguments_over_the_limit_are_refused_before_anything_is_written() -> None:
    app = app_with(ToldStorage)

    @app.task()
    async def echo(text: str) -> str:
        return text

    async with app:
        with pytest.raises(PayloadTooLarge, match="takes at most 20000"):
            await echo.add_task("a" * LARGEST)
        with pytest.raises(PayloadTooLarge, match="takes at most 20000"):
            await echo.map([("a",), ("a" * LARGEST,)])
        assert not (await app.broker.depth("default")).ready


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
            await handle.wait_result(timeout=20)
    assert "lease was lost" not in caplog.text
