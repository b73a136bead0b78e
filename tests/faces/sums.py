"""Tasks of both faces and their worker, `python -m tests.faces.sums`."""

from __future__ import annotations

import asyncio

from qtasks import AsyncRouter, SyncRouter
from qtasks.asyncio import QueueTasks

router = AsyncRouter()
blocking = SyncRouter()


@router.task(name="sums.add")
async def add(x: int, y: int) -> int:
    return x + y


@router.task(name="sums.slowly")
async def slowly(seconds: float) -> str:
    await asyncio.sleep(seconds)
    return "in the end"


@router.task(name="sums.fail")
async def fail(reason: str) -> None:
    raise ValueError(reason)


@blocking.task(name="sums.add_blocking")
def add_blocking(x: int, y: int) -> int:
    return x + y


if __name__ == "__main__":
    app = QueueTasks()
    app.include_router(router)
    app.include_router(blocking)
    app.run_forever()
