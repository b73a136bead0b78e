"""The app that the command line's tests work with."""

from __future__ import annotations

import asyncio
import os
import time
from datetime import date
from pathlib import Path

from qtasks import AsyncRouter
from qtasks.asyncio import QueueTasks

app = QueueTasks()
router = AsyncRouter()


@app.task(name="add")
async def add(x: int, y: int) -> int:
    return x + y


@app.task(name="divide")
async def divide(x: int, y: int, note: str = "") -> float:
    return x / y


@app.task(name="fail_while", queue="mail")
def fail_while(file: str) -> str:
    """Fail as long as a file is there."""
    if Path(file).exists():
        raise RuntimeError("the file is there")
    return "done"


@app.task(name="tomorrow")
async def tomorrow(day: date) -> date:
    return date.fromordinal(day.toordinal() + 1)


@app.task(name="untyped")
async def untyped(value, *more, **named):
    return {"value": value, "more": more, "named": named, "bytes": b"\xff", "set": {1}}


@app.task(name="sleep")
async def sleep(seconds: float) -> int:
    await asyncio.sleep(seconds)
    return os.getpid()


@app.task(name="hold")
async def hold(stopped: str) -> None:
    """Run until it is cancelled, and write when that was."""
    try:
        await asyncio.sleep(600)
    finally:
        Path(stopped).write_text(repr(time.time()))  # noqa: ASYNC240  # a few bytes


@router.task(name="apart")
async def apart(x: int) -> int:
    return -x


@app.task(name="with_a_name_that_is_much_longer_than_one_likes_to_read")
async def long_name() -> None:
    await asyncio.sleep(0)


@app.task()
async def nap() -> None:
    await asyncio.sleep(0)
