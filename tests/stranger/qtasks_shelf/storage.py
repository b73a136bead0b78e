"""A storage on a shelf."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from uuid import uuid4
from weakref import WeakSet

from qtasks_core import DONE, Guarantees, Inbox, Outcome, Storage, Task
from qtasks_core.errors import Closed
from qtasks_core.records import FINAL, judge, refused_by
from qtasks_core.transactions import refuse_transaction
from qtasks_core.wire import decode_task, encode_task
from qtasks_shelf.shelf import Shelf, connect


class ShelfStorage(Storage):
    def __init__(self, name: str = "") -> None:
        self._name = name
        self._shelf: Shelf | None = None
        self._inboxes: WeakSet[ShelfInbox] = WeakSet()

    @property
    def guarantees(self) -> Guarantees:
        return Guarantees(
            part="ShelfStorage",
            survives="nothing",
            durability="records end with the process",
            unsupported=(
                "query", "claim", "release", "set", "get_value", "values", "watch_value",
                "append", "read", "delete", "expire", "migrate",
            ),
        )  # fmt: skip

    async def start(self, namespace: str) -> None:
        self._shelf = connect(self._name, namespace)

    async def stop(self) -> None:
        for inbox in list(self._inboxes):
            await inbox.close()
        self._shelf = None

    async def save(self, tasks: Sequence[Task], transaction: object | None = None) -> list[Outcome]:
        if transaction is not None:
            refuse_transaction(self)
        shelf = self.started()
        return [self._save(shelf, task) for task in tasks]

    def _save(self, shelf: Shelf, task: Task) -> Outcome:
        data = shelf.records.get(task.uuid)
        stored = decode_task(data) if data is not None else None
        verdict = judge(task, stored)
        if verdict == "refuse":
            return refused_by(stored)
        if verdict == "accept":
            shelf.records[task.uuid] = data = encode_task(task)
            if task.status in FINAL:
                for address in {task.reply_to or "", *shelf.watchers.pop(task.uuid, ())}:
                    if address in shelf.boxes:
                        shelf.boxes[address].put_nowait(data)
        return DONE

    async def get(self, uuids: Sequence[str]) -> list[Task | None]:
        found = [self.started().records.get(uuid) for uuid in uuids]
        return [decode_task(data) if data is not None else None for data in found]

    async def inbox(self) -> Inbox:
        inbox = ShelfInbox(self.started())
        self._inboxes.add(inbox)
        return inbox

    def started(self) -> Shelf:
        if self._shelf is None:
            raise Closed("ShelfStorage is not started")
        return self._shelf


class ShelfInbox(Inbox):
    """A box with an address. There is no connection to lose, so it never has to read again."""

    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf
        self._address = str(uuid4())
        self._box = shelf.boxes[self._address] = asyncio.Queue()

    @property
    def address(self) -> str:
        return self._address

    def expect(self, uuids: Iterable[str]) -> None:
        """Nothing to do: a record that is pushed to a box stays in it."""

    async def watch(self, uuids: Sequence[str]) -> None:
        for uuid in uuids:
            data = self._shelf.records.get(uuid)
            if data is not None and decode_task(data).status in FINAL:
                self._box.put_nowait(data)
            else:
                self._shelf.watchers[uuid].add(self._address)

    def forget(self, uuids: Iterable[str]) -> None:
        for uuid in uuids:
            self._shelf.watchers[uuid].discard(self._address)

    async def receive(self) -> list[Task]:
        data = await self._box.get()
        if not data:
            await self.close()  # puts the end mark back, for the next call
            raise Closed("the inbox is closed")
        return [decode_task(data)]

    async def close(self) -> None:
        self._shelf.boxes.pop(self._address, None)
        self._box.put_nowait(b"")
