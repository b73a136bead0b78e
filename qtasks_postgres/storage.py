"""A storage in one table: saves judged by the server, finals pushed by NOTIFY as they commit."""

from __future__ import annotations

import asyncio
from base64 import b64decode
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from weakref import WeakSet

from uuid_utils import uuid7

from qtasks_core import DONE, Guarantees, Inbox, Outcome, Storage, Task
from qtasks_core.errors import Closed, Unavailable, WireError
from qtasks_core.records import (
    FINAL,
    FIRST_BEGUN,
    FIRST_FINAL,
    RANKS,
    judge,
    order_of,
    refused_by,
    unreadable,
)
from qtasks_core.shielded import Shielded
from qtasks_core.wire import decode_task, encode_task
from qtasks_postgres.batches import LARGEST, TOO_LARGE, batches, fitting, size_of, slices
from qtasks_postgres.connection import Database, Listener, storable

ADDRESS = "qtasks:"
"""What the address of an inbox begins with; the whole is the name of its channel."""

RIGHTS = {"records": ("SELECT", "INSERT", "UPDATE", "DELETE")}

# The WHERE is `judge`, decided under the lock of the row; a row that comes back was accepted. The
# payload of a notification is limited to 8000 bytes: a larger record is told of by its uuid. Only
# addresses of this storage's kind are notified: a name that is none of a channel would be an error.
SAVE = f"""
    WITH saved AS (
        INSERT INTO qtasks.records AS stored (
            namespace, uuid, progress, execution, status, task_name, queue, created_at, dead,
            reply_to, record
        )
        SELECT $1, * FROM unnest(
            $2::text[], $3::bigint[], $4::text[], $5::text[], $6::text[], $7::text[], $8::float8[],
            $9::text[], $10::text[], $11::bytea[]
        )
        ON CONFLICT (namespace, uuid) DO UPDATE SET
            progress = excluded.progress, execution = excluded.execution,
            status = excluded.status, task_name = excluded.task_name, queue = excluded.queue,
            created_at = excluded.created_at, dead = excluded.dead, reply_to = excluded.reply_to,
            record = excluded.record
        WHERE stored.record IS NULL OR (
            stored.progress & {RANKS - 1} < {FIRST_FINAL}
            AND stored.progress <= excluded.progress
            AND excluded.progress & {RANKS - 1} >= {FIRST_BEGUN}
            AND (stored.progress, stored.execution)
                IS DISTINCT FROM (excluded.progress, excluded.execution)
        )
        RETURNING uuid, progress, reply_to, watchers, record
    ), told AS (
        SELECT pg_notify(
            address,
            CASE WHEN length(record) <= 5800 THEN '=' || encode(record, 'base64')
                 ELSE '?' || uuid END
        )
        FROM saved CROSS JOIN LATERAL unnest(array_append(watchers, reply_to)) AS told (address)
        WHERE progress & {RANKS - 1} >= {FIRST_FINAL}
            AND address LIKE 'qtasks:%' AND octet_length(address) < 64
    )
    SELECT uuid FROM saved WHERE (SELECT count(*) FROM told) >= 0
"""

# LIMIT has each uuid looked up by itself: a plan made while the table was empty would else read all
# of the namespace once it is not.
GET = """
    SELECT found.uuid, found.record
    FROM unnest($2::text[]) AS asked (uuid)
    CROSS JOIN LATERAL (
        SELECT uuid, record FROM qtasks.records
        WHERE namespace = $1 AND uuid = asked.uuid
        LIMIT 1
    ) AS found
    WHERE found.record IS NOT NULL
"""

# What is known of a record beside its bytes.
KNOWN = """
    SELECT uuid, progress AS "order", execution, task_name, queue, created_at,
        dead IS NOT NULL AS dead
    FROM qtasks.records WHERE namespace = $1 AND uuid = ANY($2::text[])
"""

# Written into the very row that a save of the task must lock, so that either the save sees the
# watcher or the read that follows sees the save. Before the first save it makes a row without a
# record, which every save may replace.
WATCH = f"""
    INSERT INTO qtasks.records AS stored (namespace, uuid, progress, created_at, watchers)
    SELECT $1, uuid, 0, extract(epoch FROM clock_timestamp()), ARRAY[$3::text]
    FROM unnest($2::text[]) AS watched (uuid)
    ON CONFLICT (namespace, uuid) DO UPDATE SET watchers = array_append(stored.watchers, $3)
    WHERE stored.progress & {RANKS - 1} < {FIRST_FINAL}
        AND NOT $3 = ANY(coalesce(stored.watchers, '{{}}'))
"""
# A task that never was, and that nobody waits for any more, leaves no row.
UNWATCH = """
    UPDATE qtasks.records SET watchers = array_remove(watchers, $3)
    WHERE namespace = $1 AND uuid = ANY($2::text[]) AND record IS NULL
"""
CLEAR = """
    DELETE FROM qtasks.records
    WHERE namespace = $1 AND uuid = ANY($2::text[]) AND record IS NULL
        AND coalesce(cardinality(watchers), 0) = 0
"""


class PostgresStorage(Storage):
    """Remembers tasks in a table. `listen_url` is as for `PostgresBroker`."""

    driver_loggers = ("asyncpg",)

    def __init__(self, url: str, *, listen_url: str | None = None) -> None:
        self._database = Database(url, listen_url)
        self._listener = Listener(self._database)
        self._inboxes: WeakSet[PostgresInbox] = WeakSet()
        self._namespace: str | None = None

    @property
    def guarantees(self) -> Guarantees:
        durability = self._database.durability
        return Guarantees(
            part="PostgresStorage",
            server=durability.server,
            survives=durability.survives,
            durability=durability.settings,
            largest=LARGEST,
            transactions=True,
            unsupported=(
                "query", "claim", "release", "set", "get_value", "values", "watch_value",
                "append", "read", "delete", "expire",
            ),
        )  # fmt: skip

    async def start(self, namespace: str) -> None:
        await self._database.start(RIGHTS)
        try:
            await self._listener.start()
        except BaseException:
            await self._database.stop()
            raise
        self._namespace = namespace

    async def stop(self) -> None:
        await self._listener.stop()
        for inbox in tuple(self._inboxes):
            await inbox.close()
        self._namespace = None
        await self._database.stop()

    async def clock(self) -> float | None:
        self._started()
        return await self._database.clock()

    async def migrate(self, namespace: str) -> list[str]:
        return await self._database.migrate()

    async def save(self, tasks: Sequence[Task], transaction: object | None = None) -> list[Outcome]:
        namespace = self._started()
        outcomes = [DONE] * len(tasks)
        for wave in waves(tasks):
            # All savers lock rows in one order, or they could wait for each other.
            places = sorted(wave, key=lambda place: tasks[place].uuid)
            saved: set[str] = set()
            large: set[int] = set()
            for batch in batches(places, lambda place: encode_task(tasks[place])):
                fit = [(tasks[place], record) for place, record in fitting(batch)]
                if not fit:
                    large.add(batch[0][0])
                    continue
                rows = await self._database.fetch(
                    SAVE, namespace, *columns_of(fit), transaction=transaction, size=size_of(fit)
                )
                saved.update(row["uuid"] for row in rows)
            others = [place for place in places if storable(tasks[place].uuid) not in saved]
            if others:
                there = await self._get([tasks[place].uuid for place in others], transaction)
                for place, record in zip(others, there, strict=True):
                    verdict = judge(tasks[place], record)
                    if place in large and verdict == "accept":
                        outcomes[place] = Outcome("refused", TOO_LARGE)
                    elif verdict != "repeat":
                        outcomes[place] = refused_by(record)
        return outcomes

    async def get(self, uuids: Sequence[str]) -> list[Task | None]:
        return await self._get(uuids)

    async def inbox(self) -> Inbox:
        inbox = PostgresInbox(self, self._database, self._listener, self._started())
        await inbox.open()
        self._inboxes.add(inbox)
        return inbox

    async def _get(
        self, uuids: Sequence[str], transaction: object | None = None
    ) -> list[Task | None]:
        namespace = self._started()
        keys = [storable(uuid) for uuid in uuids]
        records: dict[str, Task] = {}
        wrong: dict[str, WireError] = {}
        for some in slices(keys):
            rows = await self._database.fetch(GET, namespace, some, transaction=transaction)
            for row in rows:
                try:
                    records[row["uuid"]] = decode_task(row["record"])
                except WireError as error:
                    wrong[row["uuid"]] = error
        if wrong:
            rows = await self._database.fetch(
                KNOWN, namespace, list(wrong), transaction=transaction
            )
            records.update(
                (row["uuid"], unreadable(error=wrong[row["uuid"]], **row)) for row in rows
            )
        return [records.get(key) for key in keys]

    def _started(self) -> str:
        if self._namespace is None:
            raise Closed("PostgresStorage is not started")
        return self._namespace


class PostgresInbox(Inbox):
    """A channel of its own on the storage's listening connection."""

    HEARTBEAT = 3.0
    """Seconds of silence after which a waiting inbox asks whether the server is still there."""

    def __init__(
        self, storage: PostgresStorage, database: Database, listener: Listener, namespace: str
    ) -> None:
        self._storage = storage
        self._database = database
        self._listener = listener
        self._namespace = namespace
        self._address = ADDRESS + str(uuid7())
        self._expected: set[str] = set()
        self._watched: set[str] = set()
        self._left: set[str] = set()
        """Watched no more, but their rows still say so."""
        self._arrived: list[Task] = []
        self._large: list[str] = []
        self._missed = False
        self._bell = asyncio.Event()
        self._catching_up: Shielded[None] = Shielded()
        self._open = True

    @property
    def address(self) -> str:
        return self._address

    async def open(self) -> None:
        """Listen to the address. Raises `Unavailable`."""
        await self._listener.listen([self._address], self._heard)

    def expect(self, uuids: Iterable[str]) -> None:
        self._expected.update(uuids)

    async def watch(self, uuids: Sequence[str]) -> None:
        self._watched.update(uuids)
        self._left.difference_update(uuids)
        try:
            await self._listener.ensure()
            await self._register(uuids)
        except BaseException:
            self._missed = True
            raise
        finally:
            self._bell.set()

    def forget(self, uuids: Iterable[str]) -> None:
        uuids = set(uuids)
        self._expected -= uuids
        self._left |= self._watched & uuids
        self._watched -= uuids
        if self._left:
            self._bell.set()

    async def receive(self) -> list[Task]:
        while self._open:
            await self._catching_up.run(self._catch_up)
            if self._arrived:
                arrived, self._arrived = self._arrived, []
                return arrived
            if not self._open:
                break
            with suppress(TimeoutError):
                async with asyncio.timeout(self.HEARTBEAT if self._waits() else None):
                    await self._bell.wait()
        raise Closed("the inbox is closed")

    async def close(self) -> None:
        self._open = False
        self._bell.set()
        if self._catching_up.pending is not None:
            await asyncio.wait({self._catching_up.pending})
            await self._catching_up.abandon()
        self._left |= self._watched
        with suppress(Closed, Unavailable):  # the rows are few and small
            await self._unwatch()
        await self._listener.forget([self._address], self._heard)

    def _waits(self) -> bool:
        return bool(self._expected or self._watched)

    def _heard(self, payload: str | None) -> None:
        if payload is None:
            self._missed = True
        elif payload.startswith("="):
            try:
                self._arrive(decode_task(b64decode(payload[1:])))
            except WireError:
                self._missed = True  # whose it is cannot be read either: `get` knows what it asks
        else:
            self._large.append(payload[1:])
        self._bell.set()

    def _arrive(self, task: Task) -> None:
        self._expected.discard(task.uuid)
        self._watched.discard(task.uuid)
        self._arrived.append(task)

    async def _catch_up(self) -> None:
        """Be connected, and read what notifications did not bring."""
        told = self._bell.is_set()
        self._bell.clear()
        await self._listener.ensure()
        await self._unwatch()
        if self._missed:
            self._missed = False
            try:
                await self._register(list(self._watched))
                await self._read(list(self._expected))
            except BaseException:
                self._missed = True
                raise
        elif self._large:
            await self._read(self._large[:])
        elif not told and self._waits():
            await self._listener.ping()

    async def _unwatch(self) -> None:
        """Take back what was written for tasks that are not waited for any more."""
        left = sorted(self._left)
        for some in slices(sorted({storable(uuid) for uuid in left})):
            await self._database.fetch(UNWATCH, self._namespace, some, self._address)
            await self._database.fetch(CLEAR, self._namespace, some)
        self._left.difference_update(left)
        # One that is watched again since then has lost its row, or not.
        self._missed = self._missed or not self._watched.isdisjoint(left)

    async def _register(self, uuids: Sequence[str]) -> None:
        """Have saves of these tasks push their records here, then read once."""
        keys = sorted({storable(uuid) for uuid in uuids})
        for some in slices(keys):
            await self._database.fetch(WATCH, self._namespace, some, self._address)
        await self._read(uuids)

    async def _read(self, uuids: Sequence[str]) -> None:
        for task in await self._storage.get(uuids):
            if task is not None and task.status in FINAL:
                self._arrive(task)
        read = set(uuids)
        self._large = [uuid for uuid in self._large if uuid not in read]


def waves(tasks: Sequence[Task]) -> Iterator[list[int]]:
    """Yield the places of the tasks so that no wave has a uuid twice, the first saves first.

    One statement can touch a row only once.
    """
    left = list(range(len(tasks)))
    while left:
        seen: set[str] = set()
        wave: list[int] = []
        later: list[int] = []
        for place in left:
            uuid = tasks[place].uuid
            (later if uuid in seen else wave).append(place)
            seen.add(uuid)
        yield wave
        left = later


def progress_of(task: Task) -> int:
    """Return `order_of(task)` within what a column can hold, whatever the attempt."""
    order = order_of(task)
    return max(-(1 << 62), min(order, (1 << 62) + order % RANKS))


def columns_of(batch: Sequence[tuple[Task, bytes]]) -> tuple[list[object], ...]:
    """Return the columns of records, from uuid to record, as `SAVE` wants them."""
    rows = (
        (
            storable(task.uuid),
            progress_of(task),
            storable(task.execution),
            task.status,
            storable(task.task_name),
            storable(task.queue),
            task.created_at,
            storable(task.dead) if task.dead is not None else None,
            storable(task.reply_to) if task.reply_to is not None else None,
            record,
        )
        for task, record in batch
    )
    return tuple(list(column) for column in zip(*rows, strict=True))
