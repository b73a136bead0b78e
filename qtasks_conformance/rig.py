"""What a test works with: parts of the subject in a namespace of its own, all freed at the end."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from typing import Any, TypeVar

from uuid_utils import uuid7

from qtasks_conformance.commands import Setup
from qtasks_conformance.elsewhere import Elsewhere, Inside, Process
from qtasks_conformance.subject import Subject
from qtasks_core import Broker, Inbox, Status, Storage, Task, TaskMessage
from qtasks_core.schemas import LONGEST_ID

T = TypeVar("T")
P = TypeVar("P", bound=Broker | Storage)

LONG_LEASE = 30.0
"""Seconds: longer than any test that must not lose a lease."""
SCRIPTS = ("ü", "中", "🦀", "marks")
"""Characters of two, three and four bytes, and those that mean something to some server."""
_MARKS = "a:b/c.*?%_{}[]()'\"\\|&;$,=+-#@! \t\r\n"


class Rig:
    """Starts parts and other processes for one test."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.namespace = f"kit{uuid7().hex[-12:]}"
        self.within = subject.lease + subject.slack
        """Seconds within which a lost delivery must be with another."""
        self._namespaces = {self.namespace}
        self._end = AsyncExitStack()
        self._end.push_async_callback(self._clean_up)  # the first to come is the last to run

    async def broker(self, *, namespace: str | None = None, lease: float | None = None) -> Broker:
        """Start one more broker; with a lease of its own (seconds) where the test needs it."""
        part = self.subject.broker if lease is None else self.subject.broker.but(lease=lease)
        return await self.started(part.broker(), namespace)

    async def storage(
        self, *, namespace: str | None = None, retention: float | None = None
    ) -> Storage:
        """Start one more storage; with a retention of its own (seconds) where the test needs it."""
        part = self.subject.storage
        storage = (part if retention is None else part.but(retention=retention)).storage()
        return await self.started(storage, namespace)

    async def started(self, part: P, namespace: str | None = None) -> P:
        """Start a part that is built already."""
        self._end.push_async_callback(part.stop)
        await part.start(self._used(namespace))
        return part

    async def inbox(self, storage: Storage) -> Inbox:
        """Open an inbox."""
        inbox = await storage.inbox()
        self._end.push_async_callback(inbox.close)
        return inbox

    async def elsewhere(self, *, lease: float | None = None) -> Elsewhere:
        """Start another process with parts of its own."""
        part = self.subject.broker if lease is None else self.subject.broker.but(lease=lease)
        setup = Setup(part, self.subject.storage, self.namespace)
        other = Inside(setup) if self.subject.ends_with_process else Process(setup)
        self._end.push_async_callback(other.close)
        await other.start()
        return other

    def background(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run something beside the test; whatever becomes of the test, it ends with it."""
        task = asyncio.create_task(work)
        self._end.push_async_callback(ended, task)
        return task

    def message(self, **fields: Any) -> TaskMessage:
        """Make a message with a new uuid, in queue `q` unless said otherwise."""
        return TaskMessage(**{"uuid": new_uuid(), "task_name": "kit.task", "queue": "q", **fields})

    def messages(self, count: int, **fields: Any) -> list[TaskMessage]:
        """Make so many messages."""
        return [self.message(**fields) for _ in range(count)]

    def record(self, status: Status, **fields: Any) -> Task:
        """Make a record with a new uuid unless one is given."""
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
        """Return the namespace, its own unless one is given, and have it cleaned up."""
        self._namespaces.add(namespace or self.namespace)
        return namespace or self.namespace

    async def _clean_up(self) -> None:
        """Clean up each namespace, also when that fails for another."""
        async with AsyncExitStack() as each:
            for namespace in self._namespaces:
                each.push_async_callback(self._clean_up_one, namespace)

    async def _clean_up_one(self, namespace: str) -> None:
        if self.subject.clean_up is not None:
            try:
                await self.subject.clean_up(namespace)
            except BaseException as error:
                error.add_note(f"while the namespace {namespace} was cleaned up")
                raise

    async def close(self) -> None:
        """Free everything, the newest first, even when some of it fails."""
        async with asyncio.timeout(60):
            await self._end.aclose()


async def ended(task: asyncio.Task[Any]) -> None:
    """Cancel a task and wait for it; how it failed was for the test to see."""
    task.cancel()
    await asyncio.wait({task})
    if not task.cancelled():
        task.exception()


def longest_ids(script: str) -> tuple[str, str, str]:
    """Return three of the longest uuids, addresses, keys or owners there are.

    Two differ in their last character; the third is the first but for its last character.
    """
    filled = (_MARKS if script == "marks" else script) * LONGEST_ID
    same = filled[: LONGEST_ID - 1]
    return f"{same}1", f"{same}2", same


def new_uuid() -> str:
    """Return a uuid as the engine makes them."""
    return str(uuid7())
