"""One task from end to end, on the parts that the environment names; run by an installed wheel."""

from __future__ import annotations

import asyncio

import qtasks
from qtasks.asyncio import QueueTasks

app = QueueTasks()


@app.task()
async def add(x: int, y: int) -> int:
    return x + y


async def main() -> None:
    async with app.worker():
        task = await add.add_task(1, 2, timeout=120)
        print(task.status, task.returning, qtasks.__file__)


asyncio.run(main())
