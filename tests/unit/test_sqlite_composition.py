"""The joint composition: what fails between its halves has changed neither."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from qtasks_core.schemas import (
    Ack,
    Completion,
    QueueDepth,
    Retry,
    Settlement,
    Status,
    Task,
    TaskMessage,
)
from qtasks_sqlite import SqliteBroker, SqliteStorage
from qtasks_sqlite.broker import SqliteSubscription
from qtasks_sqlite.composition import SqliteComposition
from qtasks_sqlite.connection import Transaction

MESSAGE = TaskMessage(uuid="u", task_name="t")
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


@pytest.fixture
async def parts(tmp_path: Path) -> AsyncIterator[tuple[SqliteBroker, SqliteStorage]]:
    url = f"sqlite:///{tmp_path}/tasks.db"
    broker, storage = SqliteBroker(url), SqliteStorage(url)
    await broker.start("n")
    await storage.start("n")
    yield broker, storage
    await broker.stop()
    await storage.stop()


@pytest.mark.parametrize("message", [MESSAGE, KEYED], ids=["plain", "with a key"])
@pytest.mark.parametrize("half", ["publishing", "saving"])
async def test_submit(
    parts: tuple[SqliteBroker, SqliteStorage],
    monkeypatch: pytest.MonkeyPatch,
    message: TaskMessage,
    half: str,
) -> None:
    broker, storage = parts
    composition = broker.compose(storage)
    assert isinstance(composition, SqliteComposition)
    with monkeypatch.context() as patched:
        part = broker if half == "publishing" else storage
        patched.setattr(part, half, breaking(getattr(part, half)))
        with pytest.raises(Broken):
            await composition.submit([message])
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
    composition = broker.compose(storage)
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
    assert await broker.depth("default") == QueueDepth(int(end == "retry"), 0, 0)
