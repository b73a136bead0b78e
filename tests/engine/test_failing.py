"""A part that fails in a way nobody foresaw ends its worker, and strands nothing."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from uuid import uuid4

import pytest

from qtasks.asyncio import QueueTasks
from qtasks.worker import replacement
from qtasks.worker import worker as worker_module
from qtasks_core import Delivery, Outcome, Subscription, Task
from qtasks_core.errors import ConfigurationError
from qtasks_memory import MemoryBroker, MemoryStorage
from qtasks_memory.inbox import MemoryInbox
from tests.processes import Process


class FailsOnce(MemoryBroker):
    """Its second `receive` raises; everything after works."""

    receives = 0
    error: BaseException = RuntimeError("a bug")

    async def subscribe(self, queues: Mapping[str, int]) -> Subscription:
        subscription = await super().subscribe(queues)
        receive = subscription.receive

        async def failing(wanted: Mapping[str, int], limit: int) -> list[Delivery]:
            self.receives += 1
            if self.receives == 2:
                raise self.error
            return await receive(wanted, limit)

        subscription.receive = failing  # type: ignore[method-assign]
        return subscription


class Storage(MemoryStorage):
    """Fails in the call that it is told."""

    fails = ""
    error: BaseException = RuntimeError("a bug")

    def _fail(self, call: str) -> None:
        if self.fails == call:
            self.fails = ""
            raise self.error

    async def get(self, uuids: Sequence[str]) -> list[Task | None]:
        self._fail("get")
        return await super().get(uuids)

    async def save(self, tasks: Sequence[Task], transaction: object | None = None) -> list[Outcome]:
        if any(task.status == "success" for task in tasks):
            self._fail("save")
        return await super().save(tasks, transaction)


async def test_a_receive_that_fails(caplog: pytest.LogCaptureFixture) -> None:
    """What runs comes to its end, what was not begun is there for the next worker."""
    name = uuid4().hex
    app = QueueTasks(name, FailsOnce(name), MemoryStorage(name))
    begun, go_on = asyncio.Event(), asyncio.Event()

    @app.task()
    async def first() -> str:
        begun.set()
        await go_on.wait()
        return "first"

    @app.task()
    async def second() -> str:
        return "second"

    async with app:
        running = await first.add_task()
        with pytest.raises(RuntimeError, match="a bug"), caplog.at_level(logging.ERROR):  # noqa: PT012
            async with app.worker() as worker:
                await begun.wait()
                await asyncio.wait_for(worker.failed, 120)
                assert not worker.ready
                waiting = await second.add_task()
                go_on.set()
        assert [r.getMessage() for r in caplog.records] == [
            f"worker {worker.id} failed: RuntimeError: a bug"
        ]
        assert (await running.wait_result(120)).returning == "first"
        async with app.worker():
            # Long before the lease, which is 30 s.
            assert (await waiting.wait_result(120)).returning == "second"


@pytest.mark.parametrize("call", ["receive", "get", "save", "inbox"])
async def test_a_part_that_takes_itself_for_cancelled(
    call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As drivers do whose connection is closed under them: nobody would hear of it."""
    name = uuid4().hex
    broker, storage = FailsOnce(name, lease=1.0), Storage(name)
    broker.error = storage.error = asyncio.CancelledError()
    broker.receives = 0 if call == "receive" else 5
    app = QueueTasks(name, broker, storage)

    @app.task()
    async def easy() -> int:
        return 1

    async with app:
        if call == "inbox":
            receive = MemoryInbox.receive

            async def cancelled(self: MemoryInbox) -> list[Task]:
                monkeypatch.setattr(MemoryInbox, "receive", receive)
                raise asyncio.CancelledError

            monkeypatch.setattr(MemoryInbox, "receive", cancelled)
            with pytest.raises(RuntimeError, match="although this call was not cancelled"):
                await easy.add_task(timeout=120)
        else:
            storage.fails = call
            with pytest.raises(RuntimeError, match="although this call was not cancelled"):  # noqa: PT012
                async with app.worker() as worker:
                    await easy.add_task()
                    await asyncio.wait_for(worker.failed, 120)
        async with app.worker():
            assert (await easy.add_task(timeout=120)).returning == 1


@pytest.mark.parametrize("call", ["get", "save"])
async def test_a_storage_that_fails(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = uuid4().hex
    storage = Storage(name)
    app = QueueTasks(name, MemoryBroker(name, lease=1.0), storage)
    monkeypatch.setattr(worker_module, "DRAIN_WITHIN", 60.0)

    @app.task()
    async def easy() -> int:
        return 1

    async with app:
        storage.fails = call
        with pytest.raises(RuntimeError, match="a bug"):  # noqa: PT012
            async with app.worker() as worker:
                task = await easy.add_task()
                await asyncio.wait_for(worker.failed, 120)
        async with app.worker():
            assert (await task.wait_result(120)).returning == 1


async def test_a_subscription_that_cannot_be_opened() -> None:
    name = uuid4().hex

    class Closed(MemoryBroker):
        async def subscribe(self, queues: Mapping[str, int]) -> Subscription:
            raise RuntimeError("a bug")

    app = QueueTasks(name, Closed(name), MemoryStorage(name))
    with pytest.raises(RuntimeError, match="a bug"):
        async with app.worker() as worker:
            await asyncio.wait_for(worker.failed, 120)


async def test_beside_a_host_another_worker_follows(caplog: pytest.LogCaptureFixture) -> None:
    """Nobody restarts the host for it, and what it enqueues would wait for ever."""
    name = uuid4().hex
    app = QueueTasks(name, FailsOnce(name, lease=1.0), MemoryStorage(name))

    @app.task()
    async def easy() -> int:
        return 1

    async with app.worker() as worker:
        first = worker.id
        await easy.add_task()
        await asyncio.wait_for(worker.failed, 120)
        assert not worker.ready
        assert (await easy.add_task(timeout=120)).returning == 1
        assert worker.ready
        assert worker.id != first
        assert (await easy.add_task(timeout=120)).returning == 1
    said = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert said[0] == f"worker {first} failed: RuntimeError: a bug"
    assert said[1].startswith(f"another worker follows {first} in ")


async def test_a_worker_that_is_wrongly_configured_is_told_of_again(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replacement, "REMIND_AFTER", 0.1)
    name = uuid4().hex
    broker = FailsOnce(name)
    broker.error = ConfigurationError("the queue is of another kind")
    app = QueueTasks(name, broker, MemoryStorage(name))

    @app.task()
    async def easy() -> int:
        return 1

    with pytest.raises(ConfigurationError, match="another kind"):  # noqa: PT012
        async with app.worker() as worker:
            await easy.add_task()
            await asyncio.wait_for(worker.failed, 120)
            async with asyncio.timeout(120):
                while caplog.text.count("nothing is received, since worker") < 2:  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
            assert not worker.ready


PROGRAM = """
from qtasks.asyncio import QueueTasks
from qtasks_memory import MemoryStorage
from tests.engine.test_failing import FailsOnce

app = QueueTasks("failing", FailsOnce(), MemoryStorage())
app.broker.receives = 1
app.run_forever()
"""


def test_a_process_ends_with_the_error(tmp_path: Path) -> None:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    process = Process(str(path), environment={})
    assert process.wait() == 1
    said = process.output()
    assert " failed: RuntimeError: a bug\n" in said
    assert said.endswith("\nRuntimeError: a bug\n")
    assert "ExceptionGroup" not in said
