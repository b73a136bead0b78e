"""The errors for a task that was not finished, or not enqueued, in time."""

from __future__ import annotations

import asyncio

from qtasks.client.registry import ever_seen, workers_alive
from qtasks_core import Storage, TaskMessage, WorkerInfo, schemas
from qtasks_core.errors import NotSupported, TaskTimeout, Unavailable
from qtasks_core.records import FINAL

LOOK = 1.0
"""Seconds for reading the record of a late task and the registry of workers."""


def unconfirmed(message: TaskMessage, trouble: str) -> Unavailable:
    """Return the error for a submission whose write was not confirmed before its deadline."""
    again = "with the same key" if message.submission else "the same uuid"
    return Unavailable(
        f"task {message.uuid} for queue {message.queue!r} is not known to be enqueued: the write "
        f"was not confirmed in time ({trouble}); submitting {again} again is safe"
    )


async def look_once(
    storage: Storage,
    uuid: str,
    timeout: float | None,
    submitted: TaskMessage | None,
    where: str | None,
) -> schemas.Task:
    """Return the record of a task if it has finished after all. Otherwise raise `TaskTimeout`.

    `submitted` is the message of the task if this process has sent it. `where` is a text about the
    broker, for users who have not chosen one.
    """
    record: schemas.Task | None = None
    alive: list[WorkerInfo] | None = None
    ever = True
    try:
        async with asyncio.timeout(LOOK):
            record = (await storage.get([uuid]))[0]
            if record is not None and record.status in FINAL:
                return record
            found = await workers_alive(storage)
            ever = bool(found) or await ever_seen(storage)
            alive = found
    except (Unavailable, TimeoutError, NotSupported):
        pass  # do not wait any longer: the error says what is known
    task = record or submitted
    if task is None:
        late = f"task {uuid}: not finished within {timeout:g} s, and no record of it can be read"
        raise TaskTimeout(late, uuid, where)
    raise TaskTimeout(
        f"task {task.task_name} {uuid} in queue {task.queue!r}: not finished within {timeout:g} s; "
        f"{_stage(record)}; {_workers(alive, ever, task.queue)}",
        uuid,
        where,
    )


def _stage(record: schemas.Task | None) -> str:
    if record is None:
        return "no record of it can be read"
    stages = {
        "new": "no worker has begun it",
        "scheduled": "it is not due yet",
        "process": f"worker {record.worker} runs it",
        "retry": f"attempt {record.attempt} failed ({record.error}) and it will run again",
    }
    return stages[record.status]


def _workers(alive: list[WorkerInfo] | None, ever: bool, queue: str) -> str:
    if alive is None:
        return "whether a worker is alive is not known"
    listening = sum(1 for worker in alive if queue in worker.queues)
    if listening:
        # Without host names: a web API may pass this message on to its clients.
        return f"{listening} alive for that queue"
    return "no worker for that queue is alive" if ever else "no worker has ever been seen"
