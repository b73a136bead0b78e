"""A storage in memory: a dict of records and a queue an inbox."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence

from uuid_utils import uuid7

from qtasks_core import DONE, Guarantees, Inbox, Outcome, Storage, Task
from qtasks_core.errors import Closed, refuse_transaction
from qtasks_core.records import FINAL, judge
from qtasks_memory.connection import Memory, connect


class MemoryStorage(Storage):
    """Remembers tasks within one process, without bound."""

    def __init__(self, name: str = "") -> None:
        self._name = name
        self._memory: Memory | None = None

    @property
    def guarantees(self) -> Guarantees:
        return Guarantees(
            part="MemoryStorage",
            survives="nothing",
            durability="records end with the process",
            unsupported=(
                "query", "claim", "release", "set", "get_value", "values", "watch_value",
                "append", "read", "delete", "expire", "migrate",
            ),
        )  # fmt: skip

    async def start(self, namespace: str) -> None:
        self._memory = connect(self._name, namespace)

    async def stop(self) -> None:
        self._memory = None

    async def save(self, tasks: Sequence[Task], transaction: object | None = None) -> list[Outcome]:
        refuse_transaction(self, transaction)
        memory = self._started()
        return [self._save(memory, task) for task in tasks]

    def _save(self, memory: Memory, task: Task) -> Outcome:
        stored = memory.records.get(task.uuid)
        verdict = judge(task, stored)
        if verdict == "refuse":
            return Outcome("refused", "a newer record is there", stored)
        if verdict == "accept":
            memory.records[task.uuid] = task
            if task.status in FINAL:
                addresses = memory.watchers.pop(task.uuid, set())
                if task.reply_to is not None:
                    addresses = addresses | {task.reply_to}
                for address in addresses & memory.inboxes.keys():
                    memory.inboxes[address].put_nowait(task)
        return DONE

    async def get(self, uuids: Sequence[str]) -> list[Task | None]:
        records = self._started().records
        return [records.get(uuid) for uuid in uuids]

    async def inbox(self) -> Inbox:
        return MemoryInbox(self._started())

    def _started(self) -> Memory:
        if self._memory is None:
            raise Closed("MemoryStorage is not started")
        return self._memory


class MemoryInbox(Inbox):
    """A queue under an address of its own; there is no connection that could break."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._address = str(uuid7())
        self._arrived = memory.inboxes[self._address] = asyncio.Queue()

    @property
    def address(self) -> str:
        return self._address

    def expect(self, uuids: Iterable[str]) -> None:
        """Do nothing: what is sent to the address cannot get lost."""

    async def watch(self, uuids: Sequence[str]) -> None:
        for uuid in uuids:
            record = self._memory.records.get(uuid)
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
        tasks = [await self._arrived.get()]
        while not self._arrived.empty():
            tasks.append(self._arrived.get_nowait())
        return tasks

    async def close(self) -> None:
        self._memory.inboxes.pop(self._address, None)
