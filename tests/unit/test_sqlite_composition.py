"""The joint composition: what fails between its halves has changed neither."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest

from qtasks_core.records import within
from qtasks_core.schemas import (
    DONE,
    LOST,
    Ack,
    Completion,
    Delivery,
    Outcome,
    QueueDepth,
    Retry,
    Settlement,
    Status,
    Task,
    TaskMessage,
)
from qtasks_core.separate import compose
from qtasks_sqlite import SqliteBroker, SqliteStorage
from qtasks_sqlite.composition import SqliteComposition
from qtasks_sqlite.connection import Transaction
from qtasks_sqlite.subscription import SqliteSubscription

MESSAGE = TaskMessage(uuid="u", task_name="t")
S = TypeVar("S", bound=SqliteStorage)
KEYED = TaskMessage(uuid="k", task_name="t", submission="s")


class Broken(Exception):
    """As a crash after the step before."""


def breaking(real: Callable[..., Callable[[Transaction], Any]]) -> Callable[..., Any]:
    """Return what does the work and then fails, within its transaction."""

    def make(*args: Any) -> Callable[[Transaction], Any]:
        work = real(*args)

        def work_and_break(turn: Transaction) -> Any:
            work(turn)
            raise Broken

        return work_and_break

    return make


@asynccontextmanager
async def started(path: Path, of: type[S]) -> AsyncIterator[tuple[SqliteBroker, S]]:
    """Start a broker and a storage of that class in one file."""
    url = f"sqlite:///{path}/tasks.db"
    broker, storage = SqliteBroker(url), of(url)
    await broker.start("n")
    await storage.start("n")
    yield broker, storage
    await broker.stop()
    await storage.stop()


@pytest.fixture
async def parts(tmp_path: Path) -> AsyncIterator[tuple[SqliteBroker, SqliteStorage]]:
    async with started(tmp_path, SqliteStorage) as both:
        yield both


@pytest.mark.parametrize("message", [MESSAGE, KEYED], ids=["plain", "with a key"])
@pytest.mark.parametrize("half", ["publishing", "saving"])
async def test_submit(
    parts: tuple[SqliteBroker, SqliteStorage],
    monkeypatch: pytest.MonkeyPatch,
    message: TaskMessage,
    half: str,
) -> None:
    broker, storage = parts
    composition = compose(broker, storage)
    assert isinstance(composition, SqliteComposition)
    with monkeypatch.context() as patched:
        part = broker if half == "publishing" else storage
        patched.setattr(part, half, breaking(getattr(part, half)))
        with pytest.raises(Broken):
            await compose(broker, storage).submit([message])
    assert await storage.get([message.uuid]) == [None]
    assert await broker.depth("default") == QueueDepth(0, 0, 0)
    assert [outcome.status for outcome in await composition.submit([message])] == ["done"]
    assert (await broker.depth("default")).ready == 1


@pytest.mark.parametrize("end", ["success", "retry"])
@pytest.mark.parametrize("half", ["settling", "saving"])
async def test_complete(
    parts: tuple[SqliteBroker, SqliteStorage],
    monkeypatch: pytest.MonkeyPatch,
    end: Status,
    half: str,
) -> None:
    broker, storage = parts
    composition = compose(broker, storage)
    await composition.submit([MESSAGE])
    subscription = await broker.subscribe({"default": 1})
    assert isinstance(subscription, SqliteSubscription)
    (delivery,) = await subscription.receive({"default": 1}, 1)
    settlement: Settlement = Ack(delivery)
    if end == "retry":
        settlement = Retry(delivery, MESSAGE)
    record = Task(uuid="u", task_name="t", status=end, attempt=1, execution="e")
    with monkeypatch.context() as patched:
        part = subscription if half == "settling" else storage
        patched.setattr(part, half, breaking(getattr(part, half)))
        with pytest.raises(Broken):
            await composition.complete(subscription, [Completion(settlement, record)])
    (before,) = await storage.get(["u"])
    assert before is not None
    assert before.status == "new"
    assert await broker.depth("default") == QueueDepth(ready=0, delayed=0, in_flight=1)
    (outcome,) = await composition.complete(subscription, [Completion(settlement, record)])
    assert outcome.status == "done"
    assert (await broker.depth("default")).ready == int(end == "retry")


class SmallStorage(SqliteStorage):
    """Takes no record with more than `most` bytes of arguments and result; nothing is there."""

    most = 0

    def saving(self, tasks: Sequence[Task]) -> Callable[[Transaction], list[Outcome]]:
        fitting = [task for task in tasks if self._size(task) <= self.most]
        save = super().saving(fitting)

        def save_some(turn: Transaction) -> list[Outcome]:
            saved = iter(save(turn))
            refused = Outcome("refused", f"over {self.most} bytes")
            return [next(saved) if self._size(task) <= self.most else refused for task in tasks]

        return save_some

    @staticmethod
    def _size(task: Task) -> int:
        return len(task.args) + len(task.returning or b"")


@pytest.fixture
async def small(tmp_path: Path) -> AsyncIterator[tuple[SqliteBroker, SmallStorage]]:
    async with started(tmp_path, SmallStorage) as both:
        yield both


async def received(
    broker: SqliteBroker, storage: SqliteStorage, *uuids: str
) -> tuple[SqliteSubscription, list[Delivery]]:
    """Submit tasks and return their deliveries."""
    messages = [TaskMessage(uuid=uuid, task_name="t") for uuid in uuids]
    assert await compose(broker, storage).submit(messages) == [DONE] * len(uuids)
    subscription = await broker.subscribe({"default": 10})
    assert isinstance(subscription, SqliteSubscription)
    return subscription, await subscription.receive({"default": 10}, 10)


def ended(uuid: str, status: Status, **fields: Any) -> Task:
    return Task(uuid=uuid, task_name="t", status=status, attempt=1, execution="e", **fields)


async def test_what_the_storage_does_not_take_is_recorded_without_its_payload(
    small: tuple[SqliteBroker, SmallStorage], caplog: pytest.LogCaptureFixture
) -> None:
    broker, storage = small
    subscription, (first, large, retried) = await received(broker, storage, "a", "b", "c")
    again = TaskMessage(uuid="c", task_name="t", attempt=2)
    outcomes = await compose(broker, storage).complete(
        subscription,
        [
            Completion(Ack(first), ended("a", "success")),
            Completion(Ack(large), ended("b", "success", returning=b"x" * 100)),
            Completion(Retry(retried, again), ended("c", "retry", args=b"x" * 100)),
        ],
    )
    assert outcomes == [DONE] * 3
    records = await storage.get(["a", "b", "c"])
    assert [record and record.status for record in records] == ["success", "error", "retry"]
    assert records[1] == within(ended("b", "success"), "over 0 bytes")
    depth = await broker.depth("default")
    assert (depth.ready, depth.delayed, depth.in_flight) == (1, 0, 0)
    assert caplog.text.count("it is kept without arguments and result") == 2


async def test_what_is_not_taken_at_all_is_not_acknowledged(
    small: tuple[SqliteBroker, SmallStorage], caplog: pytest.LogCaptureFixture
) -> None:
    broker, storage = small
    subscription, (first, second) = await received(broker, storage, "a", "b")
    storage.most = -1
    ends = [
        Completion(Ack(first), ended("a", "success")),
        Completion(Ack(second), None),
    ]
    outcomes = await compose(broker, storage).complete(subscription, ends)
    assert outcomes == [Outcome("unknown", "over -1 bytes"), DONE]
    assert await broker.depth("default") == QueueDepth(ready=0, delayed=0, in_flight=1)
    assert "its record is not taken" in caplog.text
    storage.most = 0
    assert await compose(broker, storage).complete(subscription, ends[:1]) == [DONE]
    assert await broker.depth("default") == QueueDepth(0, 0, 0)


async def test_settlements_in_one_transaction_see_each_other(
    small: tuple[SqliteBroker, SmallStorage],
) -> None:
    """Calls of one turn of the loop share a transaction."""
    broker, storage = small
    subscription, (delivery,) = await received(broker, storage, "a")
    again = TaskMessage(uuid="a", task_name="t", attempt=2)
    outcomes = await asyncio.gather(
        subscription.settle([Ack(delivery)]),
        subscription.settle([Retry(delivery, again)]),
        subscription.settle([Ack(delivery)]),
    )
    assert list(outcomes) == [[DONE], [LOST], [DONE]]
    assert await subscription.settle([Retry(delivery, again)]) == [LOST]
    assert await broker.depth("default") == QueueDepth(0, 0, 0)
