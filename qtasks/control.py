"""What an operator does with queues and records. Apps and the command line use it.

    from qtasks import control

    depths = await app.control(control.depths, ["mails", "reports"])

These functions run on the I/O thread: call them through `App.control`. It calls them again if the
server could not be reached, so each of them can be repeated safely.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from uuid import UUID, uuid5

from msgspec.structs import replace

from qtasks.bridge.reply import LoopReply
from qtasks.client.client import Client, cancelled
from qtasks.client.lifecycle import Lifecycle
from qtasks.client.registry import workers_alive
from qtasks_core import (
    DONE,
    Outcome,
    QueueDepth,
    Status,
    Task,
    TaskMessage,
    TaskPage,
    TaskQuery,
    WorkerInfo,
)
from qtasks_core.errors import NotSupported
from qtasks_core.names import checked_id, checked_name
from qtasks_core.separate import record_of, say_not_taken, smaller_of

REVIVED_FROM = "revived_from"
"""The header of a revived task that holds the uuid of the dead task."""
_OF_THE_ENGINE = "qtasks-"
"""Headers that start like this belong to one message; a revived task does not inherit them."""
_REVIVED = UUID("6d0b6f2e-5a55-4f0c-9d5e-3b6c2a5f8a10")
_SUBMIT_TIMEOUT = 30.0
_WAITING: tuple[Status, ...] = ("new", "scheduled", "retry")
_BATCH = 500


def revived_uuid(uuid: str, submission: str = "") -> str:
    """Return the uuid that a dead task gets when it is revived.

    It is always the same, so reviving a task twice (after a crash, or by two operators) makes only
    one new task. A uuid that comes from a key can be enqueued again later, and die again: then
    `submission`, from the record, tells the two dead tasks apart.
    """
    return str(uuid5(_REVIVED, f"{uuid}/{submission}" if submission else uuid))


async def query(client: Client, query: TaskQuery) -> TaskPage:
    """Return one page of records, newest first. Raises `NotSupported`."""
    return await client.storage.query(query)


async def depths(client: Client, queues: Iterable[str]) -> dict[str, QueueDepth]:
    """Return the depth of each queue: how many messages are ready, delayed and in flight.

    Raises `NotSupported`, and `ConfigurationError` for a wrong name.
    """
    names = [checked_name(queue, "a queue") for queue in queues]
    found = await asyncio.gather(*(client.broker.depth(name) for name in names))
    return dict(zip(names, found, strict=True))


async def purge(client: Client, queue: str) -> int:
    """Drop the messages that wait in a queue; return how many, or -1 if that is unknown.

    Their tasks are cancelled, so that nobody keeps waiting for them. Tasks that are enqueued during
    the purge may be cancelled too. A storage that cannot list tasks keeps the records as they are.
    Raises `NotSupported`, and `ConfigurationError` for a wrong name.
    """
    dropped = await client.broker.purge(checked_name(queue, "a queue"))
    with suppress(NotSupported):
        await _cancel_waiting(client, queue)
    return dropped


async def _cancel_waiting(client: Client, queue: str) -> None:
    """Cancel the tasks of a queue that have not started.

    If a message of such a task is left in the queue, no worker runs it.
    """
    kept = client.storage.guarantees.retention
    query = TaskQuery(status=_WAITING, queue=queue, limit=_BATCH)
    while True:
        page = await client.storage.query(query)
        if page.tasks:
            finals = [cancelled(record, kept) for record in page.tasks]
            outcomes = await client.storage.save(finals)
            if smaller := smaller_of(finals, outcomes):
                saved = await client.storage.save(list(smaller.values()))
                say_not_taken(finals, outcomes, dict(zip(smaller, saved, strict=True)))
        if page.cursor is None:
            return
        query = replace(query, cursor=page.cursor)


async def workers(client: Client) -> list[WorkerInfo]:
    """Return the workers that are alive, by their last heartbeats. Raises `NotSupported`."""
    return await workers_alive(client.storage)


async def migrate(of: Client | Lifecycle) -> dict[str, list[str] | None]:
    """Create or update what the servers of an app's broker and storage must have.

    The app need not be started. Returns, by the names of the broker's and the storage's class, what
    was created or changed, in words; None if it has nothing to migrate. Raises `Unavailable`, and
    `ConfigurationError` if a newer release has used the server.
    """
    done: dict[str, list[str] | None] = {}
    for part in (of.broker, of.storage):
        try:
            done[type(part).__name__] = await part.migrate(of.name)
        except NotSupported:
            done[type(part).__name__] = None
    return done


async def revive(
    client: Client, uuids: Sequence[str], without_result: Collection[str] = ()
) -> list[Outcome]:
    """Submit dead tasks again as new tasks. Each outcome's `there` is the record of the new task.

    `refused`: there is no such record, it is not dead, or its message could never be decoded. A
    task that was revived before is `done` with a `reason`, and is not submitted a second time.
    `without_result` are the names of tasks whose results are not stored.
    """
    records = await client.storage.get([checked_id(uuid, "a uuid") for uuid in uuids])
    earlier = await client.storage.get(
        [revived_uuid(u, r.submission if r else "") for u, r in zip(uuids, records, strict=True)]
    )
    outcomes: list[Outcome] = []
    messages: list[TaskMessage] = []
    for uuid, record, revived in zip(uuids, records, earlier, strict=True):
        if record is None or record.dead is None:
            outcomes.append(_not_dead(uuid, record))
        elif record.encoding == "raw":
            reason = f"task {uuid} cannot be revived: its message was never decoded: {record.error}"
            outcomes.append(Outcome("refused", reason))
        elif revived is not None:
            outcomes.append(Outcome("done", "it was revived before", there=revived))
        else:
            messages.append(_again(record, record.task_name not in without_result))
            outcomes.append(Outcome("done", there=record_of(messages[-1])))
    if messages:
        reply: LoopReply[Task | None] = LoopReply()
        client.submit_all(messages, time.monotonic() + _SUBMIT_TIMEOUT, reply)
        await reply.future
    return outcomes


def _again(record: Task, store_result: bool) -> TaskMessage:
    kept = {k: v for k, v in record.headers.items() if not k.startswith(_OF_THE_ENGINE)}
    return TaskMessage(
        uuid=revived_uuid(record.uuid, record.submission),
        task_name=record.task_name,
        queue=record.queue,
        args=record.args,
        kwargs=record.kwargs,
        encoding=record.encoding,
        priority=record.priority,
        created_at=time.time(),
        store_result=store_result,
        retention=record.retention,
        headers={**kept, REVIVED_FROM: record.uuid},
    )


async def drop(client: Client, uuids: Sequence[str]) -> list[Outcome]:
    """Delete the records of dead tasks. `refused`: there is no record, or it is not dead.

    Raises `NotSupported`.
    """
    records = await client.storage.get([checked_id(uuid, "a uuid") for uuid in uuids])
    dead = [record.uuid for record in records if record is not None and record.dead is not None]
    if dead:
        await client.storage.delete(dead)
    return [
        DONE if record is not None and record.dead is not None else _not_dead(uuid, record)
        for uuid, record in zip(uuids, records, strict=True)
    ]


def _not_dead(uuid: str, record: Task | None) -> Outcome:
    if record is None:
        return Outcome("refused", f"there is no record of a task {uuid}")
    reason = f"task {uuid} is not dead: its status is {record.status!r}"
    return Outcome("refused", reason, there=record)
