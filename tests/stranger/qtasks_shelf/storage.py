"""A storage on a shelf."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from math import inf
from uuid import uuid4
from weakref import WeakSet

from msgspec import UNSET, UnsetType

from qtasks_core import DONE, Claim, Guarantees, Inbox, Outcome, Storage, Task, TaskPage, TaskQuery
from qtasks_core.errors import Closed
from qtasks_core.names import checked_id
from qtasks_core.options import checked_retention
from qtasks_core.queries import page_of
from qtasks_core.records import FINAL, RETENTION, expiry_of, judge, refused_by
from qtasks_core.transactions import refuse_transaction
from qtasks_core.wire import decode_task, encode_task
from qtasks_shelf.shelf import Record, Shelf, connect


class ShelfStorage(Storage):
    def __init__(self, name: str = "", *, retention: float | None = RETENTION) -> None:
        self._name = name
        self._retention = checked_retention(retention)
        self._shelf: Shelf | None = None
        self._inboxes: WeakSet[ShelfInbox] = WeakSet()

    @property
    def guarantees(self) -> Guarantees:
        return Guarantees(
            part="ShelfStorage",
            survives="nothing",
            durability="records end with the process",
            retention=self._retention,
        )

    async def start(self, namespace: str) -> None:
        self._shelf = connect(self._name, namespace)

    async def stop(self) -> None:
        for inbox in list(self._inboxes):
            await inbox.close()
        if self._shelf is not None:
            self._shelf.ring()
        self._shelf = None

    async def save(self, tasks: Sequence[Task], transaction: object | None = None) -> list[Outcome]:
        if transaction is not None:
            refuse_transaction(self)
        shelf = self.started()
        return [self._save(shelf, task) for task in tasks]

    def _save(self, shelf: Shelf, task: Task) -> Outcome:
        stored = self._record(shelf, task.uuid)
        verdict = judge(task, stored)
        if verdict == "refuse":
            return refused_by(stored)
        if verdict == "accept":
            data, expiry = encode_task(task), expiry_of(task, self._retention)
            shelf.records[task.uuid] = Record(data, inf if expiry is None else expiry)
            if task.status in FINAL:
                for address in {task.reply_to or "", *shelf.watchers.pop(task.uuid, ())}:
                    if address in shelf.boxes:
                        shelf.boxes[address].put_nowait(data)
        return DONE

    async def get(self, uuids: Sequence[str]) -> list[Task | None]:
        shelf = self.started()
        return [self._record(shelf, uuid) for uuid in uuids]

    def _record(self, shelf: Shelf, uuid: str) -> Task | None:
        record = shelf.records.get(uuid)
        if record is None or record.expires_at <= time.time():
            return None
        return decode_task(record.data)

    async def inbox(self) -> Inbox:
        inbox = ShelfInbox(self.started())
        self._inboxes.add(inbox)
        return inbox

    async def query(self, query: TaskQuery) -> TaskPage:
        # A server keeps indexes, so that a page costs the same whatever it stores.
        shelf = self.started()
        found = [self._record(shelf, uuid) for uuid in shelf.records]
        return page_of([task for task in found if task is not None], query)

    async def claim(self, key: str, owner: str, ttl: float) -> Claim | None:
        claims = self.started().claims
        checked_id(key, "the key of a claim")
        checked_id(owner, "the owner of a claim")
        holder, until = claims.get(key, (owner, 0.0))
        if holder != owner and until > time.time():
            return None
        claims[key] = owner, time.time() + ttl
        return Claim(key, owner, time.time() + ttl)

    async def release(self, claim: Claim) -> None:
        claims = self.started().claims
        if claims.get(claim.key, ("", 0.0))[0] == claim.owner:
            del claims[claim.key]

    async def set(
        self, key: str, value: bytes | None, expect: bytes | UnsetType | None = UNSET
    ) -> bool:
        shelf = self.started()
        checked_id(key, "the key of a value")
        if expect is not UNSET and shelf.values.get(key) != expect:
            return False
        if value is None:
            shelf.values.pop(key, None)
        else:
            shelf.values[key] = value
        shelf.ring()
        return True

    async def get_value(self, key: str) -> bytes | None:
        return self.started().values.get(checked_id(key, "the key of a value"))

    async def values(self, prefix: str) -> dict[str, bytes]:
        return {k: v for k, v in self.started().values.items() if k.startswith(prefix)}

    async def watch_value(self, key: str) -> AsyncIterator[bytes | None]:
        shelf, bell = self.started(), asyncio.Event()
        checked_id(key, "the key of a value")
        shelf.waiting.add(bell)
        try:
            seen = shelf.values.get(key)
            yield seen
            while True:
                await bell.wait()
                bell.clear()
                self.started()
                if shelf.values.get(key) != seen:
                    seen = shelf.values.get(key)
                    yield seen
        finally:
            shelf.waiting.discard(bell)

    async def append(self, uuid: str, items: Sequence[bytes]) -> None:
        self.started().streams[checked_id(uuid, "a uuid")].extend(items)

    async def read(self, uuid: str, after: int) -> list[tuple[int, bytes]]:
        items = self.started().streams.get(uuid, [])
        return list(enumerate(items[after:], after + 1))

    async def delete(self, uuids: Sequence[str]) -> int:
        shelf = self.started()
        for uuid in uuids:
            shelf.streams.pop(uuid, None)
        return sum(shelf.records.pop(uuid, None) is not None for uuid in uuids)

    async def expire(self) -> int:
        now, records = time.time(), self.started().records
        return await self.delete([uuid for uuid, r in records.items() if r.expires_at <= now])

    async def migrate(self, namespace: str) -> list[str]:
        return []  # a shelf needs nothing

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
            record = self._shelf.records.get(uuid)
            if record is not None and decode_task(record.data).status in FINAL:
                self._box.put_nowait(record.data)
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
