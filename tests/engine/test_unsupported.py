"""A task that asks for what its broker or storage cannot do is warned of, once."""

from __future__ import annotations

import logging
from uuid import uuid4

import pytest

from qtasks import TaskFailed
from qtasks.asyncio import QueueTasks
from qtasks.declare.tasks import message_of
from qtasks_core import Guarantees
from qtasks_memory import MemoryBroker, MemoryStorage


class Plain(MemoryBroker):
    """A broker without priorities."""

    @property
    def guarantees(self) -> Guarantees:
        return Guarantees(part="Plain", survives="nothing", durability="none", lease=30.0)


class Keeping(MemoryStorage):
    """A storage that deletes nothing."""

    @property
    def guarantees(self) -> Guarantees:
        return Guarantees(
            part="Keeping", survives="nothing", durability="none", unsupported=("expire",)
        )


@pytest.fixture
def app() -> QueueTasks:
    name = f"unsupported-{uuid4().hex[:8]}"
    app = QueueTasks(name, Plain(name), Keeping(name))

    @app.task(name="urgent", priority=9)
    async def urgent() -> None: ...

    @app.task(name="brief", retention=60)
    async def brief() -> None: ...

    @app.task(name="usual")
    async def usual() -> None: ...

    return app


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if "does not have" in r.getMessage()]


@pytest.mark.parametrize("worker", [False, True])
async def test_at_the_start_and_once(
    app: QueueTasks, caplog: pytest.LogCaptureFixture, worker: bool
) -> None:
    async with app.worker() if worker else app, app:
        priority, retention = warnings(caplog)
    assert priority.startswith("task urgent asks for a priority, which Plain does not have: ")
    named = priority.partition("with any storage: ")[2].split(", ")
    assert {"MemoryBroker", "PostgresBroker", "SqliteBroker"} <= {*named}
    assert "KafkaBroker" not in named
    assert retention.startswith("task brief asks for a retention, which Keeping does not have: ")
    assert "SqliteStorage" in retention
    async with app:
        assert len(warnings(caplog)) == 2


async def test_a_call_that_asks_for_it(app: QueueTasks, caplog: pytest.LogCaptureFixture) -> None:
    usual = app.definition("usual")
    async with app:
        caplog.clear()
        for priority in (5, 7, 8):
            await app.submit(message_of(app, usual, [], {}, priority=priority), None)
        await app.submit_all([message_of(app, usual, [], {}, priority=7)])
        (line,) = warnings(caplog)
        assert line.startswith("task usual asks for a priority")


async def test_a_task_that_this_app_does_not_know(
    app: QueueTasks, caplog: pytest.LogCaptureFixture
) -> None:
    """As a process's default app submits those of routers."""
    other = QueueTasks(app.name, app.broker, app.storage)
    async with other:
        for name in ("urgent", "brief", "usual"):
            await other.submit(message_of(other, app.definition(name), [], {}), None)
    assert [line.split()[1] for line in warnings(caplog)] == ["urgent", "brief"]


async def test_a_pair_that_can_is_quiet(caplog: pytest.LogCaptureFixture) -> None:
    app = QueueTasks("met", f"memory://{uuid4()}")

    @app.task(priority=9, retention=60)
    async def urgent() -> None: ...

    async with app.worker():
        await urgent.add_task(timeout=120)
    assert warnings(caplog) == []


async def test_an_unknown_task_names_the_name_that_others_may_use(
    caplog: pytest.LogCaptureFixture,
) -> None:
    place = f"memory://{uuid4().hex}"
    ours, theirs = QueueTasks(broker=place), QueueTasks(broker=place)

    @theirs.task(name="theirs")
    async def theirs_task() -> None: ...

    caplog.set_level(logging.WARNING)
    async with ours.worker(), theirs:
        task = await theirs_task.add_task()
        for _ in range(1000):
            if "put back" in caplog.text:
                break
            with pytest.raises((TimeoutError, TaskFailed)):
                await task.wait_result(0.02)
    assert f"unknown task theirs {task.uuid}; put back" in caplog.text
    assert 'another program may use the name "qtasks"' in caplog.text
