"""Correct uses: each `assert_type` is a promise to users' editors. Checked, never run."""

from __future__ import annotations

from collections.abc import AsyncIterator, Coroutine, Generator, Iterator
from contextlib import asynccontextmanager
from typing import Any, assert_type

from fastapi import FastAPI
from starlette.applications import Starlette

import qtasks
from qtasks import (
    AsyncResult,
    AsyncRouter,
    BlockingTask,
    SyncResult,
    SyncRouter,
    Task,
    TaskFailed,
    TaskTimeout,
)
from qtasks.asyncio import QueueTasks
from qtasks.declare.tasks import AsyncCall, SyncCall
from qtasks.integrations.fastapi import install_error_handlers, lifespan
from qtasks.plugins import Plugin, Retries

router = AsyncRouter(plugins=[Retries(5)])
app = QueueTasks(broker="memory://")
blocking_router = SyncRouter()
blocking_app = qtasks.QueueTasks(broker="memory://")


@router.task()
async def add(x: int, y: int) -> int:
    return x + y


@router.task(name="shout", queue="loud", priority=9, retry=3, store_result=True, retention=60)
def shout(text: str, *, times: int = 1) -> str:
    return text.upper() * times


@app.task()
async def nothing() -> None: ...


@app.task()
def pairs(n: int) -> list[tuple[int, str]]:
    return [(n, str(n))]


@blocking_router.task()
def halve(x: float) -> float:
    return x / 2


@blocking_app.task()
async def length(text: str) -> int:
    return len(text)


@router.task()
async def ticks(n: int) -> AsyncIterator[int]:
    for tick in range(n):
        yield tick


@app.task(retry=1, max_time=2.5, plugins=[Plugin()])
def letters(text: str) -> Generator[str, None, None]:
    yield from text


async def as_bytes(tick: int) -> bytes:
    return bytes(tick)


@app.task(generate_handler=as_bytes)
async def packed(n: int) -> AsyncIterator[int]:
    yield n


@blocking_app.task(generate_handler=len)
def lengths(*texts: str) -> Iterator[str]:
    yield from texts


async def asynchronous() -> None:
    task = await add.add_task(1, 2, timeout=5)
    assert_type(task, Task[int])
    assert_type(task.returning, int)
    assert_type(await task.wait_result(5), Task[int])
    assert_type((await shout.add_task("a", times=2)).returning, str)
    assert_type((await pairs.add_task(1)).returning, list[tuple[int, str]])

    assert_type((await ticks.add_task(3)).returning, list[int])
    assert_type((await letters.add_task("abc")).returning, list[str])
    assert_type((await packed.add_task(3)).returning, list[bytes])

    call = shout.call("a", times=2)
    assert_type(call, AsyncCall[str])
    assert_type(await call.add_task(timeout=5, delay=1, queue="loud", priority=1), Task[str])
    assert_type(await call.add_task(expires=9.5), Task[str])
    assert_type(await call.add_task(key="order 7"), Task[str])
    assert_type(await add.using(app).call(1, y=2).add_task(), Task[int])
    assert_type(await add.map([(1, 2), (3, 4)]), list[Task[int]])
    assert_type(await app.add_tasks([add.call(1, 2), shout.call("a")]), list[Task[Any]])
    assert_type(await app.get_task(task.uuid), Task[Any] | None)
    assert_type(await AsyncResult(task.uuid).wait_result(), Task[Any])

    # Called directly a task is its function.
    coroutine = add(1, y=2)
    assert_type(await assert_type(coroutine, Coroutine[Any, Any, int]), int)
    assert_type(await add.using(app)(1, 2), int)
    assert_type(shout("a"), str)
    assert_type(pairs(1), list[tuple[int, str]])
    await nothing()

    async with app as entered, app.worker(concurrency=5, queues=["default"]):
        assert_type(entered, QueueTasks)


def blocking() -> None:
    task = halve.add_task(1.0, timeout=5)
    assert_type(task, BlockingTask[float])
    assert_type(task.returning, float)
    assert_type(task.wait_result(5), BlockingTask[float])
    assert_type(length.add_task("a").returning, int)
    assert_type(lengths.add_task("a").returning, list[int])
    assert_type(lengths("a"), Iterator[str])
    assert_type(halve.call(1.0), SyncCall[float])
    assert_type(halve.using(blocking_app).call(x=1.0).add_task(delay=1), BlockingTask[float])
    assert_type(halve.map([(1.0,)]), list[BlockingTask[float]])
    assert_type(blocking_app.add_tasks([halve.call(1.0)]), list[BlockingTask[Any]])
    assert_type(blocking_app.get_task(task.uuid), BlockingTask[Any] | None)
    assert_type(SyncResult(task.uuid).wait_result(1), BlockingTask[Any])
    assert_type(halve(1.0), float)
    with blocking_app as entered:
        assert_type(entered, qtasks.QueueTasks)


def over_http() -> None:
    @asynccontextmanager
    async def plain(api: FastAPI) -> AsyncIterator[None]:
        yield

    @asynccontextmanager
    async def stateful(api: FastAPI) -> AsyncIterator[dict[str, int]]:
        yield {"a": 1}

    assert_type(FastAPI(lifespan=lifespan()), FastAPI)
    install_error_handlers(FastAPI(lifespan=lifespan(app)))
    install_error_handlers(Starlette(lifespan=lifespan(blocking_app)))
    assert_type(FastAPI(lifespan=lifespan(app, plain)), FastAPI)
    assert_type(FastAPI(lifespan=lifespan(app, stateful)), FastAPI)


def failures() -> None:
    try:
        halve.add_task(1.0, timeout=1)
    except TaskTimeout as late:
        assert_type(late.uuid, str | None)
    except TaskFailed as failed:
        assert_type(failed.record.error, str | None)
