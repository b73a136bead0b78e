"""What an operator does with queues and records, and a caller with one task.

    from qtasks import control

    depths = await app.control(control.depths, ["mails", "reports"])

These functions run on the I/O thread: call them through `App.control`. It calls them again if the
server could not be reached, so each of them can be repeated safely.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from functools import partial
from uuid import UUID, uuid5

from msgspec.structs import replace
from uuid_utils import uuid7

from qtasks.client.client import Client
from qtasks.client.lifecycle import START_TIMEOUT, Lifecycle
from qtasks.client.registry import workers_alive
from qtasks.client.retrying import retry
from qtasks.client.times import cancelled_kept_for
from qtasks_core import (
    DONE,
    Command,
    Outcome,
    QueueDepth,
    ReviewedMigration,
    Status,
    Task,
    TaskMessage,
    TaskPage,
    TaskQuery,
    WorkerInfo,
)
from qtasks_core.errors import NotSupported, Refused, Unavailable, UnknownTask
from qtasks_core.names import checked_id, checked_name
from qtasks_core.records import FINAL, not_taken, record_of, say_not_taken, smaller_of, within

logger = logging.getLogger("qtasks")

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


async def newest(client: Client, uuid: str) -> Task | None:
    """Return the newest record of a task, None where there is none."""
    return (await client.storage.get([uuid]))[0]


async def cancel(client: Client, uuid: str) -> bool:
    """Record that a task is cancelled, and tell the worker that runs it.

    False: it had finished by itself before. Raises `UnknownTask`, `Unavailable`, `Refused`.
    """
    deadline = time.monotonic() + START_TIMEOUT
    read = partial(newest, client, uuid)
    record = await retry(read, deadline=deadline)
    while record is not None and record.status not in FINAL:
        end = cancelled(record, client.storage.guarantees.retention)
        # Repeated here, with the same record: by `App.control` it would be another one.
        outcome = (await retry(partial(client.storage.save, [end]), deadline=deadline))[0]
        if not_taken(outcome):
            end = within(end, outcome.reason)
            outcome = (await retry(partial(client.storage.save, [end]), deadline=deadline))[0]
        if not_taken(outcome):
            raise Refused(f"task {uuid} cannot be cancelled: {outcome.reason}")
        if outcome.status == "done":
            await _tell(client, Command(name="cancel", target=uuid))
            return True
        # It has gone on meanwhile: it has finished, or another attempt has begun.
        record = await retry(read, deadline=deadline)
    if record is None:
        raise UnknownTask(f"there is no record of a task {uuid}")
    return record.status == "cancel"


async def _tell(client: Client, command: Command) -> None:
    """Broadcast what workers find out by themselves too, only later."""
    try:
        await client.broker.broadcast(command)
    except NotSupported:
        return
    except Unavailable as error:
        logger.warning("%s of %s is not broadcast: %s", command.name, command.target, error)


def cancelled(record: Task, retention: float | None) -> Task:
    """Return the record of a task that is cancelled now; `retention` is the storage's own."""
    # An execution of its own tells this record from the one of a run.
    return replace(
        record,
        status="cancel",
        execution=f"cancel/{uuid7()}",
        finished_at=time.time(),
        due_at=None,
        retention=cancelled_kept_for(record, retention),
    )


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
    for half in (of.broker, of.storage):
        try:
            done[type(half).__name__] = await half.migrate(of.name)
        except NotSupported:
            done[type(half).__name__] = None
    return done


async def migration(of: Client | Lifecycle) -> dict[str, str | None]:
    """Return what `migrate` would do, as scripts for the servers. Changes nothing.

    The app need not be started. Returns the scripts by the names of the broker's and the storage's
    class. Empty: nothing has to change. None: it has no script. Raises the same errors as
    `migrate`.
    """
    return {
        type(half).__name__: await half.migration(of.name)
        if isinstance(half, ReviewedMigration)
        else None
        for half in (of.broker, of.storage)
    }


async def revive(
    client: Client, uuids: Sequence[str], without_result: Collection[str] = ()
) -> list[Outcome]:
    """Submit dead tasks again as new tasks. Each outcome's `current` is the record of the new task.

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
            outcomes.append(Outcome("done", "it was revived before", current=revived))
        else:
            messages.append(_again(record, record.task_name not in without_result))
            outcomes.append(Outcome("done", current=record_of(messages[-1])))
    if messages:
        await client.submit_all(messages, time.monotonic() + _SUBMIT_TIMEOUT)
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
    return Outcome("refused", reason, current=record)
