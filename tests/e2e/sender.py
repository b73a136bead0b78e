"""A machine whose clock is wrong: `python -m tests.e2e.sender SECONDS EXPIRES`.

It enqueues one task that expires, and prints the uuid. `SECONDS` is how far its clock is ahead.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable

from qtasks import AsyncRouter
from qtasks.asyncio import QueueTasks

router = AsyncRouter()


@router.task(name="note")
async def note() -> str:
    return "ran"


def set_clock(ahead: float) -> None:
    """Have all of this process see another time."""
    real: Callable[[], float] = time.time
    time.time = lambda: real() + ahead


async def main(expires: float) -> None:
    app = QueueTasks()
    app.include_router(router)
    async with app:
        print((await note.call().add_task(expires=expires)).uuid)


if __name__ == "__main__":
    set_clock(float(sys.argv[1]))
    asyncio.run(main(float(sys.argv[2])))
