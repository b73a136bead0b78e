"""An API that knows only the router. With USED_BEFORE it uses the default app as it is imported."""

from __future__ import annotations

import os

from fastapi import FastAPI

from tests.faces.descriptors import sockets
from tests.faces.sums import add, add_blocking, mark

api = FastAPI()
IMPORTED_BY = os.getpid()
BEFORE = add_blocking.add_task(1, 1, timeout=120).returning if "USED_BEFORE" in os.environ else None


@api.get("/")
async def root(x: int, y: int) -> dict[str, int | None]:
    task = await add.add_task(x, y, timeout=120)
    return {
        "sum": task.returning,
        "pid": os.getpid(),
        "imported_by": IMPORTED_BY,
        "before": BEFORE,
        "sockets": sockets(),
    }


@api.get("/thread")
def thread(x: int, y: int) -> dict[str, int]:
    """Not a coroutine function, so it runs in a thread, where the blocking face belongs."""
    return {"sum": add_blocking.add_task(x, y, timeout=120).returning}


@api.get("/mark")
async def mark_directory(directory: str) -> None:
    await mark.add_task(directory, timeout=120)
