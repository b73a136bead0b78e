"""What a storage does not take for its size: the task has a result all the same."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from threading import Event
from uuid import uuid4

import pytest
from msgspec.structs import replace

from qtasks import PayloadTooLarge
from qtasks.asyncio import QueueTasks
from qtasks.worker.job import isolated_runs
from qtasks_core import Guarantees, Outcome, Status, Task
from qtasks_core.wire import encode_task
from qtasks_memory import MemoryBroker, MemoryStorage
from tests.engine.test_poison import Counting

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
        ended = [await handle.wait_result(timeout=120) for handle in handles]
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
        task = await fails.add_task("a", timeout=120)
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


class PickyStorage(MemoryStorage):
    """Takes no record with one of the statuses in `untaken`; nothing is there instead."""

    untaken: frozenset[Status] = frozenset({"process"})

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.untaken_end = Event()
        """Set once a final record was not taken either."""

    async def save(self, tasks: Sequence[Task], transaction: object | None = None) -> list[Outcome]:
        outcomes = []
        for task in tasks:
            if task.status in self.untaken:
                if task.status == "error" and not task.args:
                    self.untaken_end.set()
                outcomes.append(Outcome("refused", f"over the limit of {LARGEST} bytes"))
            else:
                outcomes += await super().save([task], transaction)
        return outcomes


class PickiestStorage(PickyStorage):
    untaken = frozenset({"process", "error", "success"})


async def test_a_poison_candidate_over_the_limit_ends_as_an_error(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Its isolated run is counted in a record without arguments."""
    name = uuid4().hex
    app = QueueTasks(broker=Counting(name), storage=SmallStorage(name))
    counts: list[int] = []

    @app.task(name="candidate")
    async def echo(text: str) -> str:
        (record,) = await app.client.storage.get([uuid])
        counts.append(isolated_runs(record))
        return text

    async with app:
        handle = await echo.add_task("a" * 30_000)
        uuid = handle.uuid
        async with app.worker():
            ended = await handle.wait_result(timeout=120)
        depth = await app.broker.depth("default")
    assert (ended.status, ended.dead) == ("error", "unstorable result")
    assert str(LARGEST) in str(ended.error)
    assert counts == [1]
    assert not depth.ready
    assert not depth.in_flight
    assert "cancelled" not in caplog.text


async def test_a_poison_candidate_that_cannot_be_counted_does_not_run() -> None:
    name = uuid4().hex
    app = QueueTasks(broker=Counting(name), storage=PickyStorage(name))
    runs: list[int] = []

    @app.task(name="candidate")
    async def candidate() -> None:
        runs.append(1)

    async with app, app.worker():
        ended = await candidate.add_task(timeout=120)
        depth = await app.broker.depth("default")
    assert (ended.status, ended.dead) == ("error", "unstorable record")
    assert str(LARGEST) in str(ended.error)
    assert runs == []
    assert not depth.ready
    assert not depth.in_flight


async def test_a_poison_candidate_without_a_recorded_end_is_not_acknowledged() -> None:
    name = uuid4().hex
    storage = PickiestStorage(name)
    app = QueueTasks(broker=Counting(name, lease=60), storage=storage)

    @app.task(name="candidate")
    async def candidate() -> None: ...

    async with app:
        handle = await candidate.add_task()
        async with app.worker():
            assert await asyncio.to_thread(storage.untaken_end.wait, 10)
        record = await app.get(handle.uuid)
        assert record is not None
        assert record.status == "new"
        depth = await app.broker.depth("default")
    assert (depth.ready or 0) + (depth.in_flight or 0) == 1
