"""The inboxes of this process. The reader fills them, as it reads every final record anyway."""

from __future__ import annotations

import asyncio
from asyncio import Future
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Sequence

from uuid_utils import uuid7

from qtasks_core import Inbox, Task
from qtasks_core.errors import Closed
from qtasks_core.records import FINAL
from qtasks_core.together import together
from qtasks_log.reader import Reader


class Inboxes:
    """Which inboxes want which final records."""

    def __init__(
        self, reader: Reader, records: Callable[[Sequence[str]], Awaitable[list[Task | None]]]
    ) -> None:
        self.reader = reader
        self.records = records
        """Returns the records of uuids, as far as the log has been read."""
        self.addresses: dict[str, LogInbox] = {}
        self.watchers: defaultdict[str, set[LogInbox]] = defaultdict(set)

    def push(self, task: Task) -> None:
        """Put a final record that was just read into all inboxes that want it."""
        inboxes = self.watchers.pop(task.uuid, set())
        if task.reply_to is not None and task.reply_to in self.addresses:
            inboxes.add(self.addresses[task.reply_to])
        for inbox in inboxes:
            inbox.put(task)

    async def close(self) -> None:
        """Close every inbox."""
        await together([inbox.close() for inbox in self.addresses.values()])


class LogInbox(Inbox):
    """A list with an address that only the reader of this process looks for."""

    def __init__(self, inboxes: Inboxes) -> None:
        self._inboxes = inboxes
        self._address = str(uuid7())
        self._arrived: list[Task] = []
        self._bell: Future[None] | None = None
        self._open = True
        inboxes.addresses[self._address] = self

    @property
    def address(self) -> str:
        return self._address

    def expect(self, uuids: Iterable[str]) -> None:
        """Do nothing: after a reconnect the reader continues at its position and misses nothing."""

    async def watch(self, uuids: Sequence[str]) -> None:
        """Note the uuids, then check the records already read. The reader brings the rest."""
        self._started()
        for uuid in uuids:
            self._inboxes.watchers[uuid].add(self)
        found = [task for task in await self._inboxes.records(uuids) if task is not None]
        final = [task for task in found if task.status in FINAL]
        self.forget([task.uuid for task in final])
        for task in final:
            self.put(task)

    def forget(self, uuids: Iterable[str]) -> None:
        watchers = self._inboxes.watchers
        for uuid in uuids:
            if uuid in watchers:
                watchers[uuid].discard(self)
                if not watchers[uuid]:
                    del watchers[uuid]

    async def receive(self) -> list[Task]:
        while not self._arrived:
            self._started()
            self._bell = asyncio.get_running_loop().create_future()
            await self._inboxes.reader.wait(self._bell, idle=True)
        arrived, self._arrived = self._arrived, []
        return arrived

    async def close(self) -> None:
        if self._open:
            self._open = False
            self.forget(list(self._inboxes.watchers))
            del self._inboxes.addresses[self._address]
            self._ring()

    def put(self, task: Task) -> None:
        """Add a record that arrived."""
        self._arrived.append(task)
        self._ring()

    def _ring(self) -> None:
        if self._bell is not None and not self._bell.done():
            self._bell.set_result(None)

    def _started(self) -> None:
        if not self._open:
            raise Closed("the inbox is closed")
        self._inboxes.reader.keep_reading()
