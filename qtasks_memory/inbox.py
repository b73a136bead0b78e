"""An inbox in memory: a queue with an address."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence

from uuid_utils import uuid7

from qtasks_core import Inbox, Task
from qtasks_core.errors import Closed
from qtasks_core.records import FINAL
from qtasks_memory.connection import Memory


class MemoryInbox(Inbox):
    """A queue with its own address. It has no connection that could break."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._address = str(uuid7())
        self._arrived = memory.inboxes[self._address] = asyncio.Queue()

    @property
    def address(self) -> str:
        return self._address

    def expect(self, uuids: Iterable[str]) -> None:
        """Do nothing: a record that is sent to the address cannot get lost."""

    async def watch(self, uuids: Sequence[str]) -> None:
        for uuid in uuids:
            record = self._memory.record(uuid)
            if record is not None and record.status in FINAL:
                self._arrived.put_nowait(record)
            else:
                self._memory.watchers[uuid].add(self._address)

    def forget(self, uuids: Iterable[str]) -> None:
        for uuid in uuids:
            if uuid in self._memory.watchers:
                self._memory.watchers[uuid].discard(self._address)
                if not self._memory.watchers[uuid]:
                    del self._memory.watchers[uuid]

    async def receive(self) -> list[Task]:
        arrived = [await self._arrived.get()]
        while not self._arrived.empty():
            arrived.append(self._arrived.get_nowait())
        tasks = [task for task in arrived if task is not None]
        if len(tasks) < len(arrived):
            await self.close()  # so that the next call raises too
        if not tasks:
            raise Closed("the inbox is closed")
        return tasks

    async def close(self) -> None:
        self._memory.inboxes.pop(self._address, None)
        self._arrived.put_nowait(None)
