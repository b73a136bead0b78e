"""Submitting tasks and waiting for their ends, from any loop and from plain threads."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple
from uuid import UUID, uuid5

from qtasks.bridge.io_thread import io_thread
from qtasks.bridge.reply import LoopReply, ThreadReply
from qtasks.client.client import Client, unconfirmed
from qtasks.client.lifecycle import START_TIMEOUT, Lifecycle
from qtasks.client.registry import ever_seen, workers_alive
from qtasks.client.unmet import Unmet
from qtasks_core import Broker, Storage, TaskMessage, schemas
from qtasks_core.errors import (
    Closed,
    ConfigurationError,
    NotSupported,
    TaskTimeout,
    Unavailable,
    UnknownTask,
)
from qtasks_core.names import is_id
from qtasks_core.records import FINAL
from qtasks_core.separate import record_of

PUBLISH_TIMEOUT = 30.0
"""Seconds after which a write that is not confirmed is an error, where no timeout is given."""
_PART = 10_000
"""So many of many messages have one deadline: all of them may take longer than that."""
_KEYED = UUID("2f6d1c0e-8a43-5b7e-9c15-7d0e4b9a6f32")
_LOOK = 1.0
"""Seconds in which what is known of a late task is looked up."""


class Submitting(Lifecycle):
    """What an app does for callers. Each call has a twin that blocks on the same crossing."""

    def __init__(
        self, name: str, broker: Broker | str, storage: Storage | str, max_payload: int
    ) -> None:
        super().__init__(name, broker, storage)
        self.max_payload = max_payload
        self.unmet = Unmet()
        """What tasks ask for that these parts cannot do; each is logged once."""

    def uuid_of(self, task_name: str, key: str) -> str:
        """Return the uuid that a task enqueued with this `key=` has."""
        return str(uuid5(_KEYED, "\0".join((self.name, task_name, key))))

    async def submit(self, message: TaskMessage, timeout: float | None) -> schemas.Task:
        """Submit a message; with `timeout` (seconds) wait for its end, else for the write.

        One with a key that is taken gives what is there, or its end.
        Raises `TaskTimeout` when the write was durable by then and the task had not ended,
        `Unavailable` when it was not known to be, `Refused`.
        """
        began = _begin(timeout)
        thread, client = await self.ready(timeout)
        self.unmet.submitted((message,), self.broker, self.storage)
        reply: LoopReply[schemas.Task | None] = LoopReply()
        deadline = began + (PUBLISH_TIMEOUT if timeout is None else timeout)
        thread.post(client.submit, message, deadline, timeout is not None, reply)
        found = await self._ended(client, message.uuid, reply, began, timeout, message)
        return found or record_of(message)

    def submit_blocking(self, message: TaskMessage, timeout: float | None) -> schemas.Task:
        """Do as `submit`, from a thread without a loop."""
        began = _begin(timeout)
        thread, client = self.ready_blocking(timeout)
        self.unmet.submitted((message,), self.broker, self.storage)
        reply: ThreadReply[schemas.Task | None] = ThreadReply()
        deadline = began + (PUBLISH_TIMEOUT if timeout is None else timeout)
        thread.post(client.submit, message, deadline, timeout is not None, reply)
        found = self._ended_blocking(client, message.uuid, reply, began, timeout, message)
        return found or record_of(message)

    async def submit_all(self, messages: Sequence[TaskMessage]) -> list[schemas.Task]:
        """Submit many messages, part by part: however many there are, others get in between.

        Raises the first error of a part after all of the part had an answer; what is behind it
        is not submitted.
        """
        thread, client = await self.ready()
        self.unmet.submitted(messages, self.broker, self.storage)
        for part in _parts(messages):
            await thread.ask(client.submit_all, part, time.monotonic() + PUBLISH_TIMEOUT)
        return [record_of(message) for message in messages]

    def submit_all_blocking(self, messages: Sequence[TaskMessage]) -> list[schemas.Task]:
        """Do as `submit_all`, from a thread without a loop."""
        thread, client = self.ready_blocking()
        self.unmet.submitted(messages, self.broker, self.storage)
        for part in _parts(messages):
            deadline = time.monotonic() + PUBLISH_TIMEOUT
            thread.ask_blocking(client.submit_all, part, deadline)
        return [record_of(message) for message in messages]

    async def wait(self, uuid: str, timeout: float | None) -> schemas.Task:
        """Return the final record of any task, once there is one.

        Raises `TaskTimeout`, and `UnknownTask` for a uuid that no task can have.
        """
        uuid = _possible(uuid)
        began = _begin(timeout)
        thread, client = await self.ready(_look_at_least(timeout))
        reply: LoopReply[schemas.Task | None] = LoopReply()
        thread.post(client.wait, uuid, reply)
        return _there(await self._ended(client, uuid, reply, began, timeout))

    def wait_blocking(self, uuid: str, timeout: float | None) -> schemas.Task:
        """Do as `wait`, from a thread without a loop."""
        uuid = _possible(uuid)
        began = _begin(timeout)
        thread, client = self.ready_blocking(_look_at_least(timeout))
        reply: ThreadReply[schemas.Task | None] = ThreadReply()
        thread.post(client.wait, uuid, reply)
        return _there(self._ended_blocking(client, uuid, reply, began, timeout))

    async def get(self, uuid: str | UUID) -> schemas.Task | None:
        """Return the newest record of a task, None where there is none."""
        if not is_id(str(uuid)):
            return None
        thread, client = await self.ready()
        return (await thread.run(client.get, [str(uuid)], time.monotonic() + START_TIMEOUT))[0]

    def get_blocking(self, uuid: str | UUID) -> schemas.Task | None:
        """Do as `get`, from a thread without a loop."""
        if not is_id(str(uuid)):
            return None
        thread, client = self.ready_blocking()
        deadline = time.monotonic() + START_TIMEOUT
        return thread.run_blocking(client.get, [str(uuid)], deadline)[0]

    async def cancel_task(self, uuid: str | UUID) -> bool:
        """Cancel a task that has not ended; False: it had ended by itself before.

        From then on it is cancelled for everybody. What runs of it is stopped soon after: an async
        function is cancelled, a function in a process killed, of one in a thread the result is
        dropped. Raises `UnknownTask`, `Unavailable`.
        """
        uuid = _possible(str(uuid))
        thread, client = await self.ready()
        record = await thread.run(client.cancel, uuid, time.monotonic() + START_TIMEOUT)
        return record.status == "cancel"

    def cancel_task_blocking(self, uuid: str | UUID) -> bool:
        """Do as `cancel_task`, from a thread without a loop."""
        uuid = _possible(str(uuid))
        thread, client = self.ready_blocking()
        deadline = time.monotonic() + START_TIMEOUT
        return thread.run_blocking(client.cancel, uuid, deadline).status == "cancel"

    async def _ended(
        self,
        client: Client,
        uuid: str,
        reply: LoopReply[schemas.Task | None],
        began: float,
        timeout: float | None,
        submitted: TaskMessage | None = None,
    ) -> schemas.Task | None:
        """Await a reply; past the timeout take the wait back, look once, and say what is known."""
        try:
            async with asyncio.timeout(_left(timeout, began)):
                return await reply.future
        except TimeoutError:
            io_thread().post(client.forget, uuid, reply)
        except asyncio.CancelledError:
            io_thread().post(client.forget, uuid, reply)
            raise
        if submitted is not None and not reply.durable:
            raise unconfirmed(submitted, reply.trouble)
        known = await io_thread().run(_known, client, uuid, submitted)
        return _ended_or_late(uuid, timeout, submitted, known, self._written_to())

    def _ended_blocking(
        self,
        client: Client,
        uuid: str,
        reply: ThreadReply[schemas.Task | None],
        began: float,
        timeout: float | None,
        submitted: TaskMessage | None = None,
    ) -> schemas.Task | None:
        try:
            return reply.result(_left(timeout, began))
        except TimeoutError:
            io_thread().post(client.forget, uuid, reply)
        except KeyboardInterrupt:
            io_thread().post(client.forget, uuid, reply)
            raise
        if submitted is not None and not reply.durable:
            raise unconfirmed(submitted, reply.trouble)
        known = io_thread().run_blocking(_known, client, uuid, submitted)
        return _ended_or_late(uuid, timeout, submitted, known, self._written_to())

    def _written_to(self) -> str | None:
        """Say which broker a default app uses: nobody gave it one in the code."""
        if not self.starts_itself:
            return None
        return f"this process's default app {self.name!r} uses the broker {self.addresses()[0]}"


def _possible(uuid: str) -> str:
    """Return the uuid. Raises `UnknownTask` for text that no task can have."""
    if not is_id(uuid):
        raise UnknownTask(f"no task can have the uuid {ascii(uuid)[:120]}")
    return uuid


def _parts(messages: Sequence[TaskMessage]) -> Iterator[Sequence[TaskMessage]]:
    for at in range(0, len(messages), _PART):
        yield messages[at : at + _PART]


def _begin(timeout: float | None) -> float:
    """Return the time. Raises `ConfigurationError` for a timeout that no clock can compare."""
    if timeout is not None and math.isnan(timeout):
        raise ConfigurationError(f"timeout={timeout} is not a number of seconds")
    return time.monotonic()


def _look_at_least(timeout: float | None) -> float | None:
    """Return the time to connect in: past a wait's own, its task is still looked at."""
    return None if timeout is None else max(timeout, _LOOK)


def _left(timeout: float | None, began: float) -> float | None:
    return None if timeout is None else began + timeout - time.monotonic()


class _Known(NamedTuple):
    """What is known of a late task."""

    record: schemas.Task | None
    workers: int | None = None
    """How many workers have its queue; None: unknown."""
    ever: bool = True
    """Whether there ever was a worker of this app, as far as known."""


async def _known(client: Client, uuid: str, submitted: TaskMessage | None) -> _Known:
    """Look at a late task. It is not worth waiting long for."""
    record: schemas.Task | None = None
    try:
        async with asyncio.timeout(_LOOK):
            record = (await client.get([uuid], 0.0))[0]
            alive = await workers_alive(client.storage)
            ever = bool(alive) or await ever_seen(client.storage)
    except (Unavailable, TimeoutError, NotSupported):
        return _Known(record)
    task = record or submitted
    return _Known(record, sum(1 for w in alive if task and task.queue in w.queues), ever)


def _ended_or_late(
    uuid: str,
    timeout: float | None,
    submitted: TaskMessage | None,
    known: _Known,
    where: str | None,
) -> schemas.Task:
    """Return the record of a task that has ended after all. Raises `TaskTimeout`."""
    record = known.record
    if record is not None and record.status in FINAL:
        return record
    task = record or submitted
    if task is None:
        late = f"task {uuid}: no end within {timeout} s, and no record of it can be read"
        raise TaskTimeout(late, uuid, where)
    if known.workers is None:
        listening = "whether a worker is alive is not known"
    elif known.workers:
        # Not where: this message goes as far as to the clients of an API.
        listening = f"{known.workers} alive for that queue"
    elif not known.ever:
        listening = "no worker has ever been seen"
    else:
        listening = "no worker for that queue is alive"
    raise TaskTimeout(
        f"task {task.task_name} {uuid} in queue {task.queue!r}: no end within {timeout} s; "
        f"{_stage(record)}; {listening}",
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


def _there(record: schemas.Task | None) -> schemas.Task:
    if record is None:
        raise Closed("a wait ended without a record")
    return record
