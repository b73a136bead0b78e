"""A storage in SQLite: one table of records. Doorbells notify inboxes."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import Any

from msgspec import UNSET, UnsetType

from qtasks_core import (
    DONE,
    Claim,
    Guarantees,
    Inbox,
    Outcome,
    Storage,
    Task,
    TaskPage,
    TaskQuery,
)
from qtasks_core.errors import (
    Closed,
    WireError,
)
from qtasks_core.options import checked_retention
from qtasks_core.queries import cursor_at, place_of
from qtasks_core.records import (
    FINAL,
    FIRST_BEGUN,
    FIRST_FINAL,
    RANKS,
    RETENTION,
    expiry_of,
    order_of,
    refused_by,
    retention_note,
)
from qtasks_core.together import together
from qtasks_core.transactions import refuse_transaction
from qtasks_core.wire import decode_task, encode_task
from qtasks_sqlite import listing, shared
from qtasks_sqlite.connection import (
    Database,
    Transaction,
    array,
    connect,
    disconnect,
    migrated,
    with_server,
)
from qtasks_sqlite.inbox import SqliteInbox, Which
from qtasks_sqlite.listening import Listeners
from qtasks_sqlite.options import Synchronous, durability, path_of

# A record keeps its first `created_at`, its place in lists. So an update does not touch the index.
_INTO = (
    "INTO qtasks_records "
    "(namespace, uuid, ord, execution, task_name, queue, created_at, dead, expires_at, data)"
)
_REPLACE = f"""
ON CONFLICT DO UPDATE SET ord = excluded.ord, execution = excluded.execution,
    task_name = excluded.task_name, queue = excluded.queue, dead = excluded.dead,
    expires_at = excluded.expires_at, data = excluded.data
WHERE (qtasks_records.ord % {RANKS} < {FIRST_FINAL} AND excluded.ord >= qtasks_records.ord
       AND excluded.ord % {RANKS} >= {FIRST_BEGUN}
       AND (excluded.ord, excluded.execution) != (qtasks_records.ord, qtasks_records.execution))
   OR qtasks_records.expires_at <= ?
"""
_THESE = "namespace = ? AND uuid IN (SELECT value FROM json_each(?))"
_KEPT = f"{_THESE} AND (expires_at IS NULL OR expires_at > ?)"
"""An expired record counts as deleted, even if `expire` has not deleted it yet."""
_ONLY: dict[Which, str] = {
    "all": "",
    # Others are the first record of a first attempt.
    "begun": f" AND ord NOT IN ({RANKS}, {RANKS + 1})",
    "final": f" AND ord % {RANKS} >= {FIRST_FINAL}",
}


class SqliteStorage(Storage):
    """Keeps records in a file.

    `synchronous="full"` survives a crash of the machine. `retention` is in seconds, None means for
    ever. It applies to final records without a retention.
    """

    def __init__(
        self, url: str, *, synchronous: Synchronous = "normal", retention: float | None = RETENTION
    ) -> None:
        self.path = path_of(url)
        self.synchronous = synchronous
        self.namespace = 0
        self._database: Database | None = None
        self._retention = checked_retention(retention)
        self._inboxes: set[SqliteInbox] = set()
        self._listeners = Listeners()
        survives, words = durability(synchronous)
        self._guarantees = Guarantees(
            part="SqliteStorage",
            survives=survives,
            durability=words,
            at_best="machine crash",
            best_settings="?synchronous=full",
            retention=self._retention,
            notes=(retention_note(self._retention),),
        )

    @property
    def guarantees(self) -> Guarantees:
        return self._guarantees

    async def start(self, namespace: str) -> None:
        if self._database is None:
            self._database = await connect(self.path, self.synchronous)
        database = self._database

        def enter(turn: Transaction) -> int:
            # List the addresses under the lock: an inbox listens before it writes a row here.
            alive = array(database.doorbell.addresses())
            turn.execute(
                "DELETE FROM qtasks_watchers WHERE address NOT IN (SELECT value FROM json_each(?))",
                (alive,),
            )
            return turn.namespace(namespace)

        self.namespace = await database.write(enter)
        self._guarantees = with_server(self._guarantees)

    async def stop(self) -> None:
        try:
            await together([inbox.close() for inbox in self._inboxes])
        finally:
            self._listeners.stop()
            database, self._database = self._database, None
            if database is not None:
                await disconnect(database)

    async def save(self, tasks: Sequence[Task], transaction: object | None = None) -> list[Outcome]:
        if transaction is not None:
            refuse_transaction(self)
        return await self.started().write(self.saving(tasks))

    def saving(self, tasks: Sequence[Task]) -> Callable[[Transaction], list[Outcome]]:
        """Return the work that saves those of these records that their order allows."""
        parts = [(part, [self._row(task) for task in part]) for part in _distinct(tasks)]

        def save(turn: Transaction) -> list[Outcome]:
            return [outcome for part, rows in parts for outcome in self._save(turn, part, rows)]

        return save

    def _save(
        self, turn: Transaction, tasks: Sequence[Task], rows: Sequence[tuple[Any, ...]]
    ) -> list[Outcome]:
        """Save records of different tasks. Usually all are accepted: then nothing is read."""
        if turn.insert(_INTO, rows, _REPLACE, time.time()) == len(tasks):
            self._tell(turn, [task for task in tasks if task.status in FINAL])
            return [DONE] * len(tasks)
        stored = self._stored(turn, [task.uuid for task in tasks])
        saved = [stored[task.uuid] == (order_of(task), task.execution) for task in tasks]
        done = [task for task, ok in zip(tasks, saved, strict=True) if ok]
        self._tell(turn, [task for task in done if task.status in FINAL])
        refused = [task.uuid for task, ok in zip(tasks, saved, strict=True) if not ok]
        there = self.getting(refused)(turn)
        return [
            DONE if ok else refused_by(there.get(task.uuid))
            for task, ok in zip(tasks, saved, strict=True)
        ]

    def _row(self, task: Task) -> tuple[Any, ...]:
        return (
            self.namespace,
            task.uuid,
            order_of(task),
            task.execution,
            task.task_name,
            task.queue,
            task.created_at,
            task.dead is not None,
            expiry_of(task, self._retention),
            encode_task(task),
        )

    def _stored(self, turn: Transaction, uuids: Sequence[str]) -> dict[str, tuple[int, str]]:
        """Return the order and the execution of records, also of expired ones."""
        rows = turn.select(
            "uuid, ord, execution",
            f"FROM qtasks_records WHERE {_THESE}",
            (self.namespace, array(uuids)),
        )
        return {uuid: (order, execution) for uuid, order, execution in rows}

    def _tell(self, turn: Transaction, finals: Sequence[Task]) -> None:
        """Ring the inboxes that want these records."""
        if not finals:
            return
        for task in finals:
            if task.reply_to is not None:
                turn.letters.setdefault(task.reply_to, []).append(task.uuid)
        if turn.execute("SELECT 1 FROM qtasks_watchers LIMIT 1").fetchone() is None:
            return
        these = self.namespace, array(task.uuid for task in finals)
        watchers = f"FROM qtasks_watchers WHERE {_THESE}"
        for uuid, address in turn.select("uuid, address", watchers, these):
            turn.letters.setdefault(address, []).append(uuid)
        turn.execute(f"DELETE {watchers}", these)

    async def get(self, uuids: Sequence[str]) -> list[Task | None]:
        found = await self.started().read(self.getting(uuids))
        return [found.get(uuid) for uuid in uuids]

    def getting(
        self, uuids: Iterable[str], only: Which = "all"
    ) -> Callable[[Transaction], dict[str, Task]]:
        """Return the work that reads these records, or only some kind of them.

        `begun` are all but the first records of a first attempt, which say no more than their
        messages.
        """
        wanted = array(uuids)
        where = _KEPT + _ONLY[only]

        def get(turn: Transaction) -> dict[str, Task]:
            these = self.namespace, wanted, time.time()
            rows = turn.select_blobs("qtasks_records", "uuid", "ord", where, these)
            found: dict[str, Task] = {}
            for (uuid, _), data in rows:
                try:
                    found[uuid] = decode_task(data)
                except WireError:
                    found[uuid] = listing.readable(turn, self.namespace, uuid)
            return found

        return get

    async def inbox(self) -> Inbox:
        inbox = SqliteInbox(self, self.started(), self._inboxes.discard)
        self._inboxes.add(inbox)
        return inbox

    async def query(self, query: TaskQuery) -> TaskPage:
        database = self.started()
        tasks: list[Task] = []
        last = None if query.cursor is None else place_of(query.cursor)
        more = True
        while more and len(tasks) < query.limit:
            look = listing.looking(self.namespace, query, last, query.limit - len(tasks))
            some, last, more = await database.read(look)
            tasks += some
        return TaskPage(tasks, cursor_at(last) if more and last is not None else None)

    async def claim(self, key: str, owner: str, ttl: float) -> Claim | None:
        return await self.started().write(shared.claiming(self.namespace, key, owner, ttl))

    async def release(self, claim: Claim) -> None:
        await self.started().write(shared.releasing(self.namespace, claim))

    async def set(
        self, key: str, value: bytes | None, expect: bytes | UnsetType | None = UNSET
    ) -> bool:
        return await self.started().write(shared.setting(self.namespace, key, value, expect))

    async def get_value(self, key: str) -> bytes | None:
        return await self.started().read(shared.getting(self.namespace, key))

    async def values(self, prefix: str) -> dict[str, bytes]:
        return await self.started().read(shared.listing(self.namespace, prefix))

    def watch_value(self, key: str) -> AsyncIterator[bytes | None]:
        changes = shared.Changes(self.namespace, key)
        return self._listeners.follow(self.started(), changes.number, changes.look)

    async def append(self, uuid: str, items: Sequence[bytes]) -> None:
        await self.started().write(shared.appending(self.namespace, uuid, items))

    async def read(self, uuid: str, after: int) -> list[tuple[int, bytes]]:
        return await self.started().read(shared.reading(self.namespace, uuid, after))

    async def delete(self, uuids: Sequence[str]) -> int:
        return await self.started().write(listing.deleting(self.namespace, uuids))

    async def expire(self) -> int:
        database = self.started()
        count, all_of_them = 0, False
        while not all_of_them:
            some, all_of_them = await database.write(listing.expiring(self.namespace))
            count += some
        await database.write(shared.tidying(self.namespace, time.time() - self._retention))
        return count

    async def migrate(self, namespace: str) -> list[str]:
        return await migrated(self.path, self.synchronous, namespace)

    def started(self) -> Database:
        """Return the database. Raises `Closed`."""
        if self._database is None:
            raise Closed("SqliteStorage is not started")
        return self._database


def _distinct(tasks: Sequence[Task]) -> list[Sequence[Task]]:
    """Split records into parts in which no uuid occurs twice. Usually that is one."""
    if len({task.uuid for task in tasks}) == len(tasks):
        return [tasks]
    parts: list[dict[str, Task]] = [{}]
    for task in tasks:
        if task.uuid in parts[-1]:
            parts.append({})
        parts[-1][task.uuid] = task
    return [list(part.values()) for part in parts]
