"""The no-op task of the benchmarks, and a worker that runs a number of them.

`python -m benchmarks.tasks URL NAME CONCURRENCY COUNT` prints `{"rate": tasks per second}`. With a
COUNT of 0 it runs until SIGTERM.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import time
from collections.abc import Sequence

from qtasks import AsyncRouter
from qtasks.asyncio import QueueTasks
from qtasks_core import Completion, Outcome, Subscription
from qtasks_core.records import FINAL

router = AsyncRouter()


@router.task(name="nothing")
async def nothing() -> None:
    """Do nothing."""


async def work_off(app: QueueTasks, count: int, concurrency: int) -> float:
    """Run a worker until it has completed `count` tasks; return tasks per second.

    Time and tasks are counted from the end of the first completed batch, to leave out the start.
    """
    async with app:
        composition = app.client.composition
        complete, loop = composition.complete, asyncio.get_running_loop()
        finished, first = 0, (0, 0.0)
        all_done: asyncio.Future[float] = loop.create_future()

        async def counted(
            subscription: Subscription, completions: Sequence[Completion]
        ) -> list[Outcome]:
            nonlocal finished, first
            outcomes = await complete(subscription, completions)
            finished += sum(1 for c in completions if c.task is not None and c.task.status in FINAL)
            if not first[0]:
                first = finished, time.perf_counter()
            if finished >= count and not all_done.done():
                rate = (finished - first[0]) / (time.perf_counter() - first[1])
                loop.call_soon_threadsafe(all_done.set_result, rate)
            return outcomes

        composition.complete = counted  # type: ignore[method-assign]
        try:
            async with app.worker(concurrency=concurrency):
                return await all_done
        finally:
            composition.complete = complete  # type: ignore[method-assign]


def main() -> None:
    """Run the worker that the arguments describe."""
    url, name, concurrency, count = sys.argv[1:]
    sys.setswitchinterval(0.0005)
    app = QueueTasks(name, url)
    app.include_router(router)
    if int(count) == 0:
        logging.basicConfig(level=logging.WARNING)
        app.run_forever(concurrency=int(concurrency))
    else:
        rate = asyncio.run(work_off(app, int(count), int(concurrency)))
        print(json.dumps({"rate": rate}), flush=True)


if __name__ == "__main__":
    main()
