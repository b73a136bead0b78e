"""An app that moves to other servers: `python -m tests.compose.moving_app worker|client STAGE`.

A stage is `old`, `moving` or `new`. A client enqueues until SIGTERM, then waits for its results.
Both note what they do as `tests.e2e.crash_app` does; a client writes `sent N PID UUID` and
`got N PID STATUS`.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from itertools import count

from qtasks import Task
from qtasks.asyncio import QueueTasks
from qtasks.compose import MigratingBroker, MigratingStorage
from qtasks_core import Broker, Storage
from tests.e2e.crash_app import CountingApp, note, router, work

BATCH = 10
DELAY = 3.0
"""Seconds; one task of each batch is delayed."""


def parts(stage: str) -> tuple[Broker | str, Storage | str]:
    """Return the broker and the storage of a stage."""
    names = ("OLD_BROKER", "NEW_BROKER", "OLD_STORAGE", "NEW_STORAGE")
    old_broker, new_broker, old_storage, new_storage = (os.environ[name] for name in names)
    if stage == "moving":
        return MigratingBroker(old_broker, new_broker), MigratingStorage(old_storage, new_storage)
    return (old_broker, old_storage) if stage == "old" else (new_broker, new_storage)


async def send(app: QueueTasks, numbers: Iterator[int]) -> None:
    """Enqueue tasks until SIGTERM, and wait for all results."""
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    task = work.using(app)
    async with app, asyncio.TaskGroup() as group:
        while not stopping.is_set():
            batch = [next(numbers) for _ in range(BATCH)]
            late, *others = batch
            tasks = [await task.call(late, 0.01).add_task(delay=DELAY)]
            tasks += await task.map([(number, 0.01) for number in others])
            for number, each in zip(batch, tasks, strict=True):
                note("sent", number, os.getpid(), each.uuid)
                group.create_task(result(number, each))
            with suppress(TimeoutError):
                async with asyncio.timeout(0.1):
                    await stopping.wait()


async def result(number: int, task: Task[int]) -> None:
    note("got", number, os.getpid(), (await task.wait_result(None)).status)


def main() -> None:
    role, stage = sys.argv[1:]
    if role == "worker":
        worker = CountingApp(None, *parts(stage))
        worker.include_router(router)
        worker.run_forever(concurrency=20)
        return
    app = QueueTasks(None, *parts(stage))
    app.include_router(router)
    asyncio.run(send(app, count(os.getpid() * 1_000_000)))


if __name__ == "__main__":
    main()
