"""`add_task(timeout=)` at its deadline: which error it is says whether the write was confirmed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any
from uuid import uuid4

import pytest

from qtasks import AsyncResult, ConfigurationError, SyncResult, SyncRouter, TaskTimeout
from qtasks.asyncio import QueueTasks
from qtasks.client.client import Waiter
from qtasks.declare.tasks import AsyncTask
from qtasks_core import Outcome, TaskMessage, schemas
from qtasks_core.errors import Unavailable
from qtasks_memory import MemoryBroker, MemoryStorage
from tests.waits import WaitedFor

TIMES = (0.0, 0.03, 0.06, 0.1, 0.15, 0.22, 0.3)
"""Seconds, so that the deadline falls into calls and into the pauses between them."""


class Gone(MemoryBroker):
    """Its server refuses, or takes the connection and says nothing."""

    def __init__(self, name: str, pause: float) -> None:
        super().__init__(name)
        self._pause = pause

    async def publish(
        self, messages: Sequence[TaskMessage], transaction: object | None = None
    ) -> list[Outcome]:
        await asyncio.sleep(self._pause)
        raise Unavailable("connection refused")


def app_on(broker: MemoryBroker, name: str) -> tuple[QueueTasks, SyncRouter]:
    app, router = QueueTasks(name, broker, MemoryStorage(name)), SyncRouter()
    router.included_by(app)
    return app, router


async def hears(task: AsyncTask[[], Any, Any], said: str) -> None:
    """Give the server the time to speak, however slow this machine is at the moment."""
    for timeout in (0.3, 1.0, 3.0, 9.0):
        with pytest.raises(Unavailable) as caught:
            await task.add_task(timeout=timeout)
        if said in str(caught.value):
            return
    pytest.fail(f"{said!r} was not in {caught.value}")


@pytest.mark.parametrize("pause", [0.0, 0.05, 60.0])
async def test_a_write_that_is_not_confirmed(pause: float) -> None:
    """Always `Unavailable`, from both faces; with what the server last said, if it spoke."""
    name = uuid4().hex
    app, router = app_on(Gone(name, pause), name)

    @app.task()
    async def lost() -> None: ...

    @router.task()
    def blocking() -> None: ...

    async with app:
        adding = [lost.add_task(timeout=time) for time in TIMES] + [
            asyncio.to_thread(blocking.add_task, timeout=time) for time in TIMES
        ]
        async with asyncio.timeout(120):
            errors = await asyncio.gather(*adding, return_exceptions=True)
        said = "no answer" if pause == 60.0 else "connection refused"
        await hears(lost, said)
    assert {type(error) for error in errors} == {Unavailable}
    assert all("is not known to be enqueued" in str(error) for error in errors)


async def test_a_write_that_is_confirmed() -> None:
    """`TaskTimeout`, also when the deadline is a moment after the confirmation."""
    name = uuid4().hex
    app, router = app_on(MemoryBroker(name), name)

    @app.task()
    async def waiting() -> None: ...

    @router.task()
    def blocking() -> None: ...

    async with app:
        for time in TIMES[1:]:
            late = await error_of(lambda: waiting.add_task(timeout=time))  # noqa: B023
            assert "no worker has begun it" in str(late)
            late = await error_of(lambda: asyncio.to_thread(blocking.add_task, timeout=time))  # noqa: B023
            assert "no worker has begun it" in str(late)


async def error_of(add: Callable[[], Awaitable[object]]) -> TaskTimeout:
    """Return the error of a call whose write is confirmed; a busy machine may need several."""
    for _ in range(30):
        try:
            await add()
        except Unavailable:
            continue
        except TaskTimeout as late:
            return late
    raise AssertionError("no write was confirmed in time")


async def test_a_caller_who_left_before_the_write_leaves_no_wait_behind() -> None:
    name = uuid4().hex
    storage = WaitedFor(name)
    app = QueueTasks(name, MemoryBroker(name), storage)

    @app.task()
    async def never_run() -> None: ...

    async with app:
        thread, client = await app.ready()
        message = never_run.call().message(app)
        deadline = time.monotonic() + 10
        waiter = Waiter(thread, client, message.uuid, 10.0, deadline, message)

        def ask_and_leave() -> None:
            client.submit_and_wait(message, waiter)
            client.forget(waiter)

        thread.post(ask_and_leave)
        async with asyncio.timeout(120):
            while await app.get_task(message.uuid) is None:  # noqa: ASYNC110  # in memory
                await asyncio.sleep(0.01)
        assert not storage.waited_for


class Silent(MemoryBroker):
    """Its server takes connections and says nothing."""

    starts = 0

    def __init__(self, name: str, patience: float) -> None:
        super().__init__(name)
        self._patience = patience

    async def start(self, namespace: str) -> None:
        self.starts += 1
        await asyncio.sleep(self._patience)
        raise Unavailable(f"no answer within {self._patience} s")


async def test_the_deadline_holds_for_an_app_that_starts_itself() -> None:
    """Its first use connects, which goes on after a caller's time is up."""
    name = uuid4().hex
    broker = Silent(name, 60.0)
    app, router = app_on(broker, name)
    app.starts_itself = True

    @app.task()
    async def lost() -> None: ...

    @router.task()
    def blocking() -> None: ...

    began = time.monotonic()
    calls = [
        *(lost.add_task(timeout=0.2) for _ in range(10)),
        *(asyncio.to_thread(blocking.add_task, timeout=0.2) for _ in range(3)),
        AsyncResult(name, app=app).wait_result(1.2),
    ]
    errors = await asyncio.gather(*calls, return_exceptions=True)
    assert time.monotonic() - began < 40  # not the 60 s of a start
    assert {str(error).partition("within")[2].partition(";")[0] for error in errors} == {
        " 0.2 s",
        " 1.2 s",
    }
    assert {type(error) for error in errors} == {Unavailable}
    assert broker.starts == 1


async def test_starts_at_once_wait_side_by_side() -> None:
    name = uuid4().hex
    app, _ = app_on(Silent(name, 1.0), name)
    began = time.monotonic()
    starts = [app.start(0.5) for _ in range(30)]
    errors = await asyncio.gather(*starts, return_exceptions=True)
    assert time.monotonic() - began < 20  # not the 30 s of one after the other
    assert {str(error) for error in errors} == {"no answer within 1.0 s"}


class Forgetful(MemoryStorage):
    """Its server does not answer those who read."""

    async def get(self, uuids: Sequence[str]) -> list[schemas.Task | None]:
        raise Unavailable("no answer")


async def test_a_timeout_says_the_queue_though_nothing_can_be_read() -> None:
    name = uuid4().hex
    app = QueueTasks(name, MemoryBroker(name), Forgetful(name))

    @app.task(queue="slow", name="waiting")
    async def waiting() -> None: ...

    async with app:
        with pytest.raises(TaskTimeout, match=r"task waiting .* in queue 'slow'.* alive is not"):
            await waiting.add_task(timeout=0.1)


async def test_what_has_ended_is_returned_however_short_the_wait() -> None:
    name = uuid4().hex
    app = QueueTasks(name, MemoryBroker(name), MemoryStorage(name))

    @app.task()
    async def one() -> int:
        return 1

    other = QueueTasks(name, MemoryBroker(name), MemoryStorage(name))
    other.starts_itself = True
    async with app.worker():
        uuid = (await one.add_task(timeout=120)).uuid
        assert (await AsyncResult(uuid, app=app).wait_result(0)).returning == 1
        assert (await AsyncResult(uuid, app=other).wait_result(0)).returning == 1
    await other.stop()


class Slow(MemoryBroker):
    """Its server needs 0.3 seconds for each batch."""

    async def publish(
        self, messages: Sequence[TaskMessage], transaction: object | None = None
    ) -> list[Outcome]:
        await asyncio.sleep(0.3)
        return await super().publish(messages, transaction)


async def test_many_may_take_longer_than_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qtasks.client.client._BATCH", 10)
    monkeypatch.setattr("qtasks.app._CHUNK", 10)
    monkeypatch.setattr("qtasks.app.PUBLISH_TIMEOUT", 2.0)
    name = uuid4().hex
    app, router = app_on(Slow(name), name)

    @app.task()
    async def one(x: int) -> int:
        return x

    @router.task()
    def blocking(x: int) -> int:
        return x

    async with app:
        handles, others = await asyncio.gather(
            one.map([(x,) for x in range(95)]),
            asyncio.to_thread(blocking.map, [(x,) for x in range(95)]),
        )
        assert [task.args for task in (*handles, *others)] == [[x] for x in range(95)] * 2
        assert await one.map([]) == []
        assert (await app.broker.depth("default")).ready == 190


async def test_timeouts_that_are_too_long_or_none() -> None:
    name = uuid4().hex
    app, router = app_on(MemoryBroker(name), name)

    @app.task()
    async def one() -> int:
        return 1

    @router.task()
    def blocking() -> int:
        return 1

    async with app.worker():
        for timeout in (1e10, float("inf")):
            assert (await one.add_task(timeout=timeout)).returning == 1
            assert (await asyncio.to_thread(blocking.add_task, timeout=timeout)).returning == 1
        uuid = (await one.add_task()).uuid
        for wrong in (
            one.add_task(timeout=float("nan")),
            asyncio.to_thread(blocking.add_task, timeout=float("nan")),
            AsyncResult(uuid, app=app).wait_result(float("nan")),
            asyncio.to_thread(SyncResult(uuid, app=app).wait_result, float("nan")),
        ):
            with pytest.raises(ConfigurationError, match="timeout=nan"):
                await wrong
