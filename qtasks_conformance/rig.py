"""What a test works with: brokers and storages in a new namespace, all stopped at the end."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from functools import partial
from typing import Any, TypeVar

from uuid_utils import uuid7

from qtasks_conformance.commands import Setup
from qtasks_conformance.elsewhere import Elsewhere, InProcess, Process
from qtasks_conformance.subject import Subject
from qtasks_conformance.waiting import PATIENCE, retry_call
from qtasks_core import Broker, Inbox, Status, Storage, Task, TaskMessage
from qtasks_core.schemas import LONGEST_ID

T = TypeVar("T")
P = TypeVar("P", bound=Broker | Storage)

LONG_LEASE = max(30.0, float(PATIENCE))
"""Seconds: longer than any test that must not lose a lease."""
SCRIPTS = ("ü", "中", "🦀", "marks")
"""Characters of two, three and four bytes in UTF-8, and those that are special to some server."""
_MARKS = "a:b/c.*?%_{}[]()'\"\\|&;$,=+-#@! \t\r\n"


class Rig:
    """Starts brokers, storages and other processes for one test, and stops them at its end."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.namespace = f"kit{uuid7().hex[-12:]}"
        self.within = subject.lease + subject.slack
        """Seconds within which another receiver must get a delivery whose holder died."""
        self._namespaces = {self.namespace}
        self._end = AsyncExitStack()
        self._end.push_async_callback(self._clean_up)  # pushed first, so it runs last

    async def broker(self, *, namespace: str | None = None, lease: float | None = None) -> Broker:
        """Start one more broker, by default with the lease of the subject (in seconds)."""
        part = self.subject.broker if lease is None else self.subject.broker.but(lease=lease)
        return await self._started_at_last(part.broker(), namespace)

    async def storage(
        self, *, namespace: str | None = None, retention: float | None = None
    ) -> Storage:
        """Start one more storage, by default with the retention of the subject (in seconds)."""
        part = self.subject.storage
        storage = (part if retention is None else part.but(retention=retention)).storage()
        return await self._started_at_last(storage, namespace)

    async def started(self, part: P, namespace: str | None = None) -> P:
        """Start a broker or a storage that is already built, at the first try."""
        self._end.push_async_callback(part.stop)
        await part.start(self._used(namespace))
        return part

    async def _started_at_last(self, part: P, namespace: str | None) -> P:
        """Start a part that is not what is tested: on a busy machine, the server may be slow."""
        self._end.push_async_callback(part.stop)
        await retry_call(partial(part.start, self._used(namespace)))
        return part

    async def inbox(self, storage: Storage) -> Inbox:
        """Open an inbox; it is closed at the end of the test."""
        inbox = await storage.inbox()
        self._end.push_async_callback(inbox.close)
        return inbox

    async def elsewhere(self, *, lease: float | None = None) -> Elsewhere:
        """Start another process with its own broker and storage."""
        part = self.subject.broker if lease is None else self.subject.broker.but(lease=lease)
        setup = Setup(part, self.subject.storage, self.namespace)
        other = InProcess(setup) if self.subject.ends_with_process else Process(setup)
        self._end.push_async_callback(other.close)
        await other.start()
        return other

    def background(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run a coroutine in the background; it is cancelled at the end of the test."""
        task = asyncio.create_task(work)
        self._end.push_async_callback(cancel_and_wait, task)
        return task

    def message(self, **fields: Any) -> TaskMessage:
        """Return a message with a new uuid, in queue `q` unless `fields` has another."""
        return TaskMessage(**{"uuid": new_uuid(), "task_name": "kit.task", "queue": "q", **fields})

    def messages(self, count: int, **fields: Any) -> list[TaskMessage]:
        """Return `count` messages with new uuids."""
        return [self.message(**fields) for _ in range(count)]

    def record(self, status: Status, **fields: Any) -> Task:
        """Return a record with a new uuid, unless `fields` has one."""
        return Task(
            **{
                "uuid": new_uuid(),
                "task_name": "kit.task",
                "queue": "q",
                "status": status,
                **fields,
            }
        )

    def _used(self, namespace: str | None) -> str:
        """Return the namespace (the test's own for None), and note it for the clean-up."""
        self._namespaces.add(namespace or self.namespace)
        return namespace or self.namespace

    async def _clean_up(self) -> None:
        """Clean up every namespace, even if that fails for one of them."""
        async with AsyncExitStack() as each:
            for namespace in self._namespaces:
                each.push_async_callback(self._clean_up_one, namespace)

    async def _clean_up_one(self, namespace: str) -> None:
        if self.subject.clean_up is not None:
            try:
                await self.subject.clean_up(namespace)
            except BaseException as error:
                error.add_note(f"raised by `clean_up` of the subject for namespace {namespace}")
                raise

    async def close(self) -> None:
        """Stop everything in reverse order, even if some of it fails. Takes at most 60 seconds."""
        async with asyncio.timeout(60):
            await self._end.aclose()


async def cancel_and_wait(task: asyncio.Task[Any]) -> None:
    """Cancel a background task and wait for it. Its error is ignored: the test has awaited it."""
    task.cancel()
    await asyncio.wait({task})
    if not task.cancelled():
        task.exception()


def longest_ids(script: str) -> tuple[str, str, str]:
    """Return three ids for uuids, addresses, keys or owners; two have the greatest length.

    The first two differ only in their last character. The third is the first without its last
    character.
    """
    filled = (_MARKS if script == "marks" else script) * LONGEST_ID
    same = filled[: LONGEST_ID - 1]
    return f"{same}1", f"{same}2", same


def new_uuid() -> str:
    """Return a uuid like those of the engine."""
    return str(uuid7())
