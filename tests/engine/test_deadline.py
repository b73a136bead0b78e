"""`add_task(timeout=)` at its deadline: which error it is says whether the write was confirmed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any
from uuid import uuid4

import pytest

from qtasks import SyncRouter, TaskTimeout
from qtasks.asyncio import QueueTasks
from qtasks.engine.reply import LoopReply
from qtasks.tasks import AsyncTask
from qtasks_core import Outcome, TaskMessage, schemas
from qtasks_core.errors import Unavailable
from qtasks_memory import MemoryBroker, MemoryStorage

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
        async with asyncio.timeout(5):
            errors = await asyncio.gather(*adding, return_exceptions=True)
        said = "no answer" if pause == 60.0 else "connection refused"
        await hears(lost, said)
    assert {type(error) for error in errors} == {Unavailable}
    assert all("is not known to be enqueued" in str(error) for error in errors)


async def test_a_write_that_is_confirmed() -> None:
    """Always `TaskTimeout`, also when the deadline is a moment after the confirmation."""
    name = uuid4().hex
    app, router = app_on(MemoryBroker(name), name)

    @app.task()
    async def waiting() -> None: ...

    @router.task()
    def blocking() -> None: ...

    async with app:
        for time in TIMES[1:]:
            with pytest.raises(TaskTimeout, match="no worker has begun it"):
                await waiting.add_task(timeout=time)
            with pytest.raises(TaskTimeout, match="no worker has begun it"):
                await asyncio.to_thread(blocking.add_task, timeout=time)


async def test_a_caller_who_left_before_the_write_leaves_no_wait_behind() -> None:
    name = uuid4().hex
    app = QueueTasks(name, MemoryBroker(name), MemoryStorage(name))

    @app.task()
    async def never_run() -> None: ...

    async with app:
        thread, client = await app.ready()
        message = never_run.call().message(app)
        reply: LoopReply[schemas.Task | None] = LoopReply()

        def ask_and_leave() -> None:
            client.submit(message, time.monotonic() + 10, True, reply)
            client.forget(message.uuid, reply)

        thread.post(ask_and_leave)
        async with asyncio.timeout(5):
            while await app.get_task(message.uuid) is None:  # noqa: ASYNC110  # in memory
                await asyncio.sleep(0.01)
        assert client._waiters == {}
