"""A client of any release: `python client.py FIRST COUNT`, in the tree of that release.

It enqueues `work` of `tests/e2e/crash_app.py`: plain, delayed, by a key, and one that it cancels.
It prints the results as one JSON object. It uses only what every release has.
"""

from __future__ import annotations

import asyncio
import json
import sys

from qtasks.asyncio import QueueTasks
from tests.e2e.crash_app import router, work

WAIT = 120.0


async def main(first: int, count: int) -> None:
    app = QueueTasks()
    app.include_router(router)
    async with app:
        numbers = range(first, first + count)
        tasks = await work.map([(number, 0.01) for number in numbers])
        late = await work.call(first + count, 0.01).add_task(delay=1.0)
        keyed = [await work.call(first + count + 1, 0.01).add_task(key=f"{first}") for _ in "ab"]
        cancelled = await work.call(first + count + 2, 0.01).add_task(delay=3600.0)
        await app.cancel(cancelled.uuid)
        done = [await task.wait_result(WAIT) for task in (*tasks, late, *keyed)]
        ended = await cancelled.wait_result(WAIT)
    print(json.dumps({"results": [task.returning for task in done], "cancelled": ended.status}))


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), int(sys.argv[2])))
