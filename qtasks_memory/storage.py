"""A storage in memory: a dict of records, and the inboxes to notify."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from weakref import WeakSet

from msgspec import UNSET, UnsetType

from qtasks_core import DONE, Claim, Guarantees, Inbox, Outcome, Storage, Task, TaskPage, TaskQuery
from qtasks_core.errors import Closed
from qtasks_core.names import checked_id
from qtasks_core.options import checked_retention
from qtasks_core.queries import page_of
from qtasks_core.records import FINAL, RETENTION, expiry_of, judge, refused_by, retention_note
from qtasks_core.together import together
from qtasks_core.transactions import refuse_transaction
from qtasks_memory.connection import Memory, connect
from qtasks_memory.inbox import MemoryInbox


class MemoryStorage(Storage):
    """Keeps records within one process. `retention` is in seconds, None means for ever."""

    def __init__(self, name: str = "", *, retention: float | None = RETENTION) -> None:
        self._name = name
        self._retention = checked_retention(retention)
        self._inboxes: WeakSet[MemoryInbox] = WeakSet()
        self._watching: set[asyncio.Event] = set()
        self._memory: Memory | None = None

    @property
    def guarantees(self) -> Guarantees:
        return Guarantees(
            part="MemoryStorage",
            survives="nothing",
            durability="records end with the process",
            retention=self._retention,
            notes=(retention_note(self._retention),),
        )

    async def start(self, namespace: str) -> None:
        self._memory = connect(self._name, namespace)

    async def stop(self) -> None:
        self._memory = None
        await together([inbox.close() for inbox in self._inboxes])
        for changed in self._watching:
            changed.set()

    async def save(self, tasks: Sequence[Task], transaction: object | None = None) -> list[Outcome]:
        if transaction is not None:
            refuse_transaction(self)
        memory = self._started()
        return [self._save(memory, task) for task in tasks]

    def _save(self, memory: Memory, task: Task) -> Outcome:
        stored = memory.record(task.uuid)
        verdict = judge(task, stored)
        if verdict == "refuse":
            return refused_by(stored)
        if verdict == "accept":
            memory.records[task.uuid] = task
            if task.status in FINAL:
                expiry = expiry_of(task, self._retention)
                moved = memory.clock.ahead
                memory.expiries[task.uuid] = None if expiry is None else expiry + moved
                addresses = memory.watchers.pop(task.uuid, set())
                if task.reply_to is not None:
                    addresses = addresses | {task.reply_to}
                for address in addresses & memory.inboxes.keys():
                    memory.inboxes[address].put_nowait(task)
        return DONE

    async def get(self, uuids: Sequence[str]) -> list[Task | None]:
        record = self._started().record
        return [record(uuid) for uuid in uuids]

    async def inbox(self) -> Inbox:
        inbox = MemoryInbox(self._started())
        self._inboxes.add(inbox)
        return inbox

    async def query(self, query: TaskQuery) -> TaskPage:
        return page_of(self._started().records.values(), query)

    async def claim(self, key: str, owner: str, ttl: float) -> Claim | None:
        memory = self._started()
        claims, now = memory.claims, memory.clock.now()
        checked_id(key, "the key of a claim")
        checked_id(owner, "the owner of a claim")
        holder, until = claims.get(key, (owner, 0.0))
        if holder != owner and until > now:
            return None
        claims[key] = owner, now + ttl
        return Claim(key, owner, time.time() + ttl)

    async def release(self, claim: Claim) -> None:
        claims = self._started().claims
        if claim.key in claims and claims[claim.key][0] == claim.owner:
            del claims[claim.key]

    async def set(
        self, key: str, value: bytes | None, expect: bytes | UnsetType | None = UNSET
    ) -> bool:
        memory = self._started()
        checked_id(key, "the key of a value")
        if expect is not UNSET and memory.values.get(key) != expect:
            return False
        if value is None:
            memory.values.pop(key, None)
        else:
            memory.values[key] = value
        for changed in memory.value_watchers.get(key, ()):
            changed.set()
        return True

    async def get_value(self, key: str) -> bytes | None:
        return self._started().values.get(checked_id(key, "the key of a value"))

    async def values(self, prefix: str) -> dict[str, bytes]:
        return {k: v for k, v in self._started().values.items() if k.startswith(prefix)}

    async def watch_value(self, key: str) -> AsyncIterator[bytes | None]:
        memory = self._started()
        checked_id(key, "the key of a value")
        changed = asyncio.Event()
        memory.value_watchers[key].add(changed)
        self._watching.add(changed)
        try:
            seen = memory.values.get(key)
            yield seen
            while True:
                await changed.wait()
                changed.clear()
                self._started()
                if memory.values.get(key) != seen:
                    seen = memory.values.get(key)
                    yield seen
        finally:
            self._watching.discard(changed)
            memory.value_watchers[key].discard(changed)

    async def append(self, uuid: str, items: Sequence[bytes]) -> None:
        self._started().streams[checked_id(uuid, "a uuid")].extend(items)

    async def read(self, uuid: str, after: int) -> list[tuple[int, bytes]]:
        items = self._started().streams.get(uuid, [])
        return list(enumerate(items[after:], after + 1))

    async def delete(self, uuids: Sequence[str]) -> int:
        memory = self._started()
        for uuid in uuids:
            memory.streams.pop(uuid, None)
            memory.expiries.pop(uuid, None)
        return sum(memory.records.pop(uuid, None) is not None for uuid in uuids)

    async def expire(self) -> int:
        memory = self._started()
        return await self.delete([uuid for uuid in memory.records if memory.record(uuid) is None])

    async def migrate(self, namespace: str) -> list[str]:
        return []  # there is no server

    def _started(self) -> Memory:
        if self._memory is None:
            raise Closed("MemoryStorage is not started")
        return self._memory
