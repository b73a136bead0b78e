"""The results that come from two storages."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from functools import partial

from qtasks.compose.merging import Merging
from qtasks_core import Inbox, Task
from qtasks_core.errors import Closed
from qtasks_core.together import together


class MergedInbox(Inbox):
    """Waits at several inboxes. Its address is that of the last one."""

    def __init__(self, inboxes: Sequence[Inbox]) -> None:
        self._inboxes = inboxes
        self._merging = Merging(
            [partial(_arrivals, inbox) for inbox in inboxes], "waiting for results"
        )
        self._closed = False

    @property
    def address(self) -> str:
        return self._inboxes[-1].address

    def expect(self, uuids: Iterable[str]) -> None:
        uuids = list(uuids)
        for inbox in self._inboxes:
            inbox.expect(uuids)

    async def watch(self, uuids: Sequence[str]) -> None:
        await together([inbox.watch(uuids) for inbox in self._inboxes])

    def forget(self, uuids: Iterable[str]) -> None:
        uuids = list(uuids)
        for inbox in self._inboxes:
            inbox.forget(uuids)

    async def receive(self) -> list[Task]:
        if self._closed:
            raise Closed("the inbox is closed")
        tasks = await self._merging.next()
        self.forget([task.uuid for task in tasks])
        return tasks

    async def close(self) -> None:
        self._closed = True
        # A waiting `receive` hears of it from the first of them.
        await together([inbox.close() for inbox in self._inboxes])
        await self._merging.close()


async def _arrivals(inbox: Inbox) -> AsyncIterator[list[Task]]:
    while True:
        yield await inbox.receive()
