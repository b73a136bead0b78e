"""Tasks of both faces and their worker, `python -m tests.faces.sums`."""

from __future__ import annotations

import time
from pathlib import Path

from qtasks import AsyncRouter, SyncRouter
from qtasks.asyncio import QueueTasks

router = AsyncRouter()
blocking = SyncRouter()


@router.task(name="sums.add")
async def add(x: int, y: int) -> int:
    return x + y


@router.task(name="sums.mark")
def mark(directory: str) -> None:
    """Leave one file at the beginning and one at the end."""
    Path(directory, "begun").touch()
    time.sleep(0.5)
    Path(directory, "ended").touch()


@blocking.task(name="sums.add_blocking")
def add_blocking(x: int, y: int) -> int:
    return x + y


if __name__ == "__main__":
    app = QueueTasks()
    app.include_router(router)
    app.include_router(blocking)
    app.run_forever()
